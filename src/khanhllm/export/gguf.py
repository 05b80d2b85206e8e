DTYPES = ("f32", "f16", "bf16", "q8_0")
