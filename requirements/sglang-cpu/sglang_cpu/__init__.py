"""SGLang on a CPU without sgl_kernel: a platform (`platform`) and a few replaced functions (`hooks`)."""
