"""Training: a model's bound kernels with backward passes, engine-free.

The forward's bits stay those of the bound kernels, whatever provider they come from. The gradient of an operation is
declared beside it (`dsv3_plugin.ops`), written out in plain torch: it is the derivative of what the operation *means*,
so it has no contract on its bits, and a faster one may replace it. FP8's products are the exception (`fp8`): those of
the backward pass are operations with contracts and kernels of their own. Attention over whole sequences has a gradient
in another form than its operations' (`layers.mla_gradient`).
"""
