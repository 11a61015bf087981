// Attention of a few new tokens against cached keys and values, read where they lie. One unit: a sequence and a key-value head.
#include "simd.h"

namespace {

INLINE float dot(const float* a, const float* b, int64_t D) {
    vf s{};
    int64_t d = 0;
    for (; d + VL <= D; d += VL) s += load(a + d) * load(b + d);
    if (d < D) s += load_some(a + d, D - d) * load_some(b + d, D - d);
    return sum(s);
}

}  // namespace

// q [S,t,Hq,D], k and v [S,L,Hkv,D] with the given strides in floats, out [S,t,Hq,D] contiguous. lengths [S] counts the valid keys,
// the t new ones included. window 0: unlimited; cap 0: none.
EXPORT void attention_cached(const float* q, int64_t q_row, int64_t q_token, int64_t q_head, const float* k, int64_t k_row, int64_t k_token,
                             int64_t k_head, const float* v, int64_t v_row, int64_t v_token, int64_t v_head, const int64_t* lengths,
                             float* out, int64_t S, int64_t t, int64_t Hq, int64_t Hkv, int64_t D, int64_t window, float scale, float cap,
                             int64_t threads) {
    const int64_t group = Hq / Hkv, DP = round_up(D, VL);
    for_each(S * Hkv, threads, [=](int64_t unit) {
        static thread_local Scratch memory;
        const int64_t s = unit / Hkv, kv = unit % Hkv, n = lengths[s], stride = round_up(n, VL);
        float *O = memory.get(group * (DP + stride)), *scores = O + group * DP;
        const float *keys = k + s * k_row + kv * k_head, *values = v + s * v_row + kv * v_head;
        for (int64_t i = 0; i < t; i++) {
            const int64_t end = n - t + i + 1, first = window ? max_<int64_t>(0, end - window) : 0;
            float* to = out + ((s * t + i) * Hq + kv * group) * D;
            if (end <= 0) {
                memset(to, 0, group * D * 4);
                continue;
            }
            const float* from = q + s * q_row + i * q_token + kv * group * q_head;
            for (int64_t j = first; j < end; j++)
                for (int64_t h = 0; h < group; h++) scores[h * stride + j - first] = dot(from + h * q_head, keys + j * k_token, D);
            const int64_t seen = end - first, padded = round_up(seen, VL);
            for (int64_t h = 0; h < group; h++) {
                float* x = scores + h * stride;
                for (int64_t j = seen; j < padded; j++) x[j] = -INFINITY;
                vf m = splat(-INFINITY);
                for (int64_t j = 0; j < padded; j += VL) {
                    vf y = load(x + j) * (cap ? scale / cap : scale * 1.44269504088896341f);
                    if (cap) y = tanh_(y) * (cap * 1.44269504088896341f);
                    store(x + j, y);
                    if (cap)
                        for (int64_t p = max_(j, seen); p < min_(j + VL, padded); p++) x[p] = -INFINITY;
                    m = vmax(load(x + j), m);
                }
                const float base = max_of(m);
                vf sums{};
                for (int64_t j = 0; j < padded; j += VL) {
                    vf e = exp2_(load(x + j) - base);
                    store(x + j, e);
                    sums += e;
                }
                const float f = 1.0f / sum(sums);
                for (int64_t j = 0; j < padded; j += VL) store(x + j, load(x + j) * f);
            }
            memset(O, 0, group * DP * 4);
            for (int64_t j = 0; j < seen; j++) {
                const float* row = values + (first + j) * v_token;
                for (int64_t h = 0; h < group; h++) {
                    const float p = scores[h * stride + j];
                    float* o = O + h * DP;
                    int64_t d = 0;
                    for (; d + VL <= D; d += VL) store(o + d, load(o + d) + load(row + d) * p);
                    for (; d < D; d++) o[d] += row[d] * p;
                }
            }
            for (int64_t h = 0; h < group; h++) memcpy(to + h * D, O + h * DP, D * 4);
        }
    });
}
