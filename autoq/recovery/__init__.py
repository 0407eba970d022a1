"""Recovery: a quantized model is trained to answer as the unquantized one does, at the same schemes and bytes.

`latents` holds what is trained of a layer, `layers` those of a model; `trainer` trains all of an assignment together,
`blocks` one block of the model after the other.
"""
