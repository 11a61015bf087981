// Attention of some new tokens against cached keys and values, read where they lie. One unit: a token and a key-value head.
#include "attend.h"

// q [S,t,Hq,D], k and v [S,L,Hkv,D] with the given strides in floats, out [S,t,Hq,D] contiguous; D is a multiple of the vectors' width.
// lengths [S] counts the valid keys, the t new ones included. window 0: unlimited; cap 0: none.
EXPORT void attention_cached(const float* q, int64_t q_row, int64_t q_token, int64_t q_head, const float* k, int64_t k_row, int64_t k_token,
                             int64_t k_head, const float* v, int64_t v_row, int64_t v_token, int64_t v_head, const int64_t* lengths,
                             float* out, int64_t S, int64_t t, int64_t Hq, int64_t Hkv, int64_t D, int64_t window, float scale, float cap,
                             int64_t threads) {
    const int64_t group = Hq / Hkv;
    for_each(S * t * Hkv, threads, [=](int64_t unit) {
        static thread_local Scratch memory;
        const int64_t s = unit / (t * Hkv), i = unit / Hkv % t, kv = unit % Hkv, last = lengths[s] - t + i + 1;
        const int64_t first = window ? max_<int64_t>(0, last - window) : 0;
        attend(q + s * q_row + i * q_token + kv * group * q_head, q_head, k + s * k_row + kv * k_head, v + s * v_row + kv * v_head, k_token,
               first, last, group, D, scale, cap, out + ((s * t + i) * Hq + kv * group) * D, memory.get(round_up(max_<int64_t>(1, last), 16)));
    });
}
