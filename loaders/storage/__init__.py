"""Where bytes lie. So far a folder of the local machine (or one mounted there); remote stores will stand beside it."""
