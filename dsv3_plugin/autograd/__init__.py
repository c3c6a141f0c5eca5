"""Training: a model's bound kernels with backward passes, engine-free.

The forward's bits stay those of the bound kernels, whatever provider they come from. The gradient of an operation is
declared beside it (`dsv3_plugin.ops`): it is the derivative of what the operation *means*. FP8's products (`fp8`) and
what would go through memory once for each step of a formula (norm, SwiGLU, the sum of experts) have gradients that are
operations themselves, with contracts and kernels. The others are written out in plain torch, without a contract on
their bits, and a faster one may replace them. Attention over whole sequences has a gradient in another form than its
operations' (`layers.mla_gradient`).
"""
