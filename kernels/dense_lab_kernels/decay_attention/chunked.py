from dense_lab_kernels.decay_attention.reference import decay_attention  # noqa
