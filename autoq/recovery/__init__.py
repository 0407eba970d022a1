"""Recovery: a quantized model is trained to answer as the unquantized one does, at the same schemes and bytes.

`latents` holds what is trained of a layer, `trainer` trains all layers of an assignment together.
"""
