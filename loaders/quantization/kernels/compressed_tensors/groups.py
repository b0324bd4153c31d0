"""How many weights share a scale in compressed-tensors' formats: what a plan knows of their kernels."""

NV_GROUP, MX_GROUP = 16, 32  # weights of a row, in NVFP4 and MXFP4
BLOCK = 128  # rows and columns of a block, in FP8_BLOCK
