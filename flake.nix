{
  description = "fbkd_ops as kernel-builder builds it (build.toml)";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
