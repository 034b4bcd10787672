"""How fast training and answering are, beside others, on this machine: every figure of the documentation can be measured again."""
