// AdamW, gradient clipping, a bfloat16 copy of the weight and its moving average, in one pass over many flat tensors.
//
// The arithmetic is float32 in the order of rae_kernels/spec/adamw.py. Compiled without contraction to fused
// multiply-adds, which a kernel that waits for memory does not miss, it gives the bits of that file.
//
// A block takes one chunk of CHUNK elements of one tensor, a thread WIDTH neighbouring elements at a time. The host
// gives THREADS, CHUNK and STREAM. There are no headers here: those of CUDA need not be installed where this compiles.

typedef unsigned short bf16;  // its bits

constexpr int WIDTH = 8;  // 128 bits of bfloat16

// One tensor. The elements before `head` are taken one by one, so that after it memory is aligned where it can be.
struct Row {
    float* weight;
    const void* gradient;
    void* exp_avg;
    void* exp_avg_sq;
    float* ema;   // or null
    bf16* copy;   // or null
    long long numel;
    long long head;
    long long first_chunk;    // number of the block that begins this tensor
    long long parameter;      // which random numbers round its moments
    long long first_element;  // place of its first element among those numbers
};

// As `Scalars` in rae_kernels/spec/adamw.py.
struct Scalars {
    float clip_factor;
    float decay;
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float inverse_root;
    float eps;
    float minus_step_size;
    float ema_decay, one_minus_ema_decay;
};

struct Random {
    unsigned seed_low, seed_high, step;
};

template <typename T, int W>
union Pack {
    T values[W];
    uint4 vectors[(W * sizeof(T) + 15) / 16];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

__device__ __forceinline__ bf16 round_to_even(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Up with the probability that leaves the expectation at x; `random` is uniform below 2**16.
__device__ __forceinline__ bf16 round_at_random(float x, unsigned random) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return round_to_even(x);  // infinite or NaN
    return static_cast<bf16>((bits + random) >> 16);
}

template <typename T, int W>
__device__ __forceinline__ Pack<T, W> load(const T* from) {
    __builtin_assume(__isGlobal(from));  // addresses out of a table could be of any memory
    Pack<T, W> pack;
    if constexpr (W > 1) {
        if ((reinterpret_cast<unsigned long long>(from) & 15) == 0) {
#pragma unroll
            for (int k = 0; k < W * sizeof(T) / 16; ++k) pack.vectors[k] = reinterpret_cast<const uint4*>(from)[k];
            return pack;
        }
    }
#pragma unroll
    for (int k = 0; k < W; ++k) pack.values[k] = from[k];
    return pack;
}

template <typename T, int W>
__device__ __forceinline__ void store(T* to, const Pack<T, W>& pack) {
    __builtin_assume(__isGlobal(to));
    if constexpr (W > 1) {
        if ((reinterpret_cast<unsigned long long>(to) & 15) == 0) {
#pragma unroll
            for (int k = 0; k < W * sizeof(T) / 16; ++k) reinterpret_cast<uint4*>(to)[k] = pack.vectors[k];
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < W; ++k) to[k] = pack.values[k];
}

// Philox4x32-10 with the counter of rae_kernels/philox.py: four words for elements 4 * group to 4 * group + 3.
__device__ __forceinline__ uint4 philox(long long group, long long parameter, const Random& random) {
    unsigned c0 = static_cast<unsigned>(group), c1 = static_cast<unsigned>(parameter);
    unsigned c2 = static_cast<unsigned>(parameter >> 32) | (STREAM << 16), c3 = random.step;
    unsigned key_low = random.seed_low, key_high = random.seed_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        unsigned low_0 = c0 * 0xD2511F53u, high_0 = __umulhi(c0, 0xD2511F53u);
        unsigned low_2 = c2 * 0xCD9E8D57u, high_2 = __umulhi(c2, 0xCD9E8D57u);
        c0 = high_2 ^ c1 ^ key_low;
        c2 = high_0 ^ c3 ^ key_high;
        c1 = low_2;
        c3 = low_0;
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// One word for each of W elements from `element` on, which begins a group if W > 1.
template <int W>
__device__ __forceinline__ void draw(long long element, long long parameter, const Random& random, unsigned* words) {
    if constexpr (W > 1) {
#pragma unroll
        for (int k = 0; k < W; k += 4) {
            uint4 group = philox((element + k) >> 2, parameter, random);
            words[k] = group.x;
            words[k + 1] = group.y;
            words[k + 2] = group.z;
            words[k + 3] = group.w;
        }
    } else {
        uint4 group = philox(element >> 2, parameter, random);
        int place = static_cast<int>(element & 3);
        words[0] = place == 0 ? group.x : place == 1 ? group.y : place == 2 ? group.z : group.w;
    }
}

// start + weight * (end - start), from the nearer end, as torch.lerp.
__device__ __forceinline__ float lerp(float start, float end, float weight, float one_minus_weight) {
    float way = end - start;
    return weight < 0.5f ? start + weight * way : end - one_minus_weight * way;
}

template <typename Gradient, typename Moment, int W>
__device__ __forceinline__ void update(const Row& row, long long i, const Scalars& s, const Random& random) {
    Moment* first = static_cast<Moment*>(row.exp_avg) + i;
    Moment* second = static_cast<Moment*>(row.exp_avg_sq) + i;
    auto gradient = load<Gradient, W>(static_cast<const Gradient*>(row.gradient) + i);
    auto weight = load<float, W>(row.weight + i);
    auto exp_avg = load<Moment, W>(first);
    auto exp_avg_sq = load<Moment, W>(second);
    Pack<float, W> ema;
    if (row.ema) ema = load<float, W>(row.ema + i);
    unsigned words[W];
    if constexpr (sizeof(Moment) == 2) draw<W>(row.first_element + i, row.parameter, random, words);
#pragma unroll
    for (int k = 0; k < W; ++k) {
        float g = widen(gradient.values[k]) * s.clip_factor;
        float m = lerp(widen(exp_avg.values[k]), g, s.one_minus_beta1, s.beta1);
        float v = widen(exp_avg_sq.values[k]) * s.beta2 + (s.one_minus_beta2 * g) * g;
        float w = weight.values[k] * s.decay + (s.minus_step_size * m) / (sqrtf(v) * s.inverse_root + s.eps);
        weight.values[k] = w;
        if constexpr (sizeof(Moment) == 2) {
            exp_avg.values[k] = round_at_random(m, words[k] & 0xffffu);
            exp_avg_sq.values[k] = round_at_random(v, words[k] >> 16);
        } else {
            exp_avg.values[k] = m;
            exp_avg_sq.values[k] = v;
        }
    }
    store<float, W>(row.weight + i, weight);
    store<Moment, W>(first, exp_avg);
    store<Moment, W>(second, exp_avg_sq);
    if (row.ema) {
#pragma unroll
        for (int k = 0; k < W; ++k)
            ema.values[k] = lerp(ema.values[k], weight.values[k], s.one_minus_ema_decay, s.ema_decay);
        store<float, W>(row.ema + i, ema);
    }
    if (row.copy) {
        Pack<bf16, W> copy;
#pragma unroll
        for (int k = 0; k < W; ++k) copy.values[k] = round_to_even(weight.values[k]);
        store<bf16, W>(row.copy + i, copy);
    }
}

template <typename Gradient, typename Moment>
__device__ __forceinline__ void update_chunk(const Row* rows, int count, const Scalars& s, const Random& random) {
    const long long block = blockIdx.x, thread = threadIdx.x;
    int low = 0, high = count - 1;
    while (low < high) {  // the last tensor that does not begin after this block
        int middle = (low + high + 1) / 2;
        if (rows[middle].first_chunk <= block) low = middle;
        else high = middle - 1;
    }
    const Row row = rows[low];
    const long long chunk = block - row.first_chunk;
    const long long start = row.head + chunk * CHUNK;
    const long long stop = start + CHUNK < row.numel ? start + CHUNK : row.numel;
    const long long tail = start + (stop - start) / WIDTH * WIDTH;
    for (long long i = start + thread * WIDTH; i < tail; i += THREADS * WIDTH)
        update<Gradient, Moment, WIDTH>(row, i, s, random);
    // Fewer than WIDTH elements on either side.
    if (chunk == 0 && thread < row.head) update<Gradient, Moment, 1>(row, thread, s, random);
    if (tail + thread < stop) update<Gradient, Moment, 1>(row, tail + thread, s, random);
}

// Two blocks on a multiprocessor have enough accesses under way, and leave registers for all of their values.
#define KERNEL(name, Gradient, Moment)                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                           \
        name(const Row* rows, int count, const Scalars scalars, const Random random) { \
        update_chunk<Gradient, Moment>(rows, count, scalars, random);                  \
    }

// By the types of the gradients and of the moments.
KERNEL(adamw_float32_float32, float, float)
KERNEL(adamw_bfloat16_float32, bf16, float)
KERNEL(adamw_float32_bfloat16, float, bf16)
KERNEL(adamw_bfloat16_bfloat16, bf16, bf16)
