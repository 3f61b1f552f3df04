"""Language models that read features: what they write, whether it was seen or leaked, and how well they answer.

`captions`, `verdict` and `evaluate` take texts and numbers and know no torch.
"""
