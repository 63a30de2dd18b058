// csrc/adamw_ema.cu for the CPU, behind the functions of CUDA's driver that rae_kernels/cuda.py calls.
#include "cuda_on_host.h"
#include "adamw_ema.cu"

using Kernel = void (*)(const Row*, int, Scalars, Random);

extern "C" {
int cuModuleGetFunction(Kernel* found, void*, const char* name) {
    const struct {
        const char* name;
        Kernel kernel;
    } kernels[] = {
        {"adamw_float32_float32", adamw_float32_float32},
        {"adamw_bfloat16_float32", adamw_bfloat16_float32},
        {"adamw_float32_bfloat16", adamw_float32_bfloat16},
        {"adamw_bfloat16_bfloat16", adamw_bfloat16_bfloat16},
    };
    for (const auto& each : kernels)
        if (!std::strcmp(each.name, name)) return *found = each.kernel, 0;
    return 500;
}

int cuGetErrorString(int, const char** text) { return *text = "named symbol not found", 0; }

int cuLaunchKernel(Kernel kernel, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned,
                   void*, void** arguments, void**) {
    // Backwards, so that what depends on the order shows.
    for (blockIdx.x = blocks; blockIdx.x-- > 0;)
        for (threadIdx.x = threads; threadIdx.x-- > 0;)
            kernel(*static_cast<const Row**>(arguments[0]), *static_cast<int*>(arguments[1]),
                   *static_cast<Scalars*>(arguments[2]), *static_cast<Random*>(arguments[3]));
    return 0;
}
}
