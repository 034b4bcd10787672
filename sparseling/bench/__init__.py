"""How fast training is, beside others, on this machine: every figure that the documentation gives can be measured again."""
