"""The sixteen values of NF4's and FP4's codes, as bitsandbytes has them: what a plan knows of their kernels."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 = (*_FP4, 0.0, *(-value for value in _FP4[1:]))
# rank -> code. FP4's is torch.argsort(FP4), with its two zeros (codes 0 and 8) in the order that torch gives them.
NF4_ORDER = tuple(range(16))
FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
VALUES = {"nf4": NF4, "fp4": FP4}
ORDERS = {"nf4": NF4_ORDER, "fp4": FP4_ORDER}
