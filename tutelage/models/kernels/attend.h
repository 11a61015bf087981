// Attention of one token against cached keys and values, and the sums of many vectors at once that it lives by.
#pragma once
#include "simd.h"

// The sums of 16 vectors, each by the tree of `sum`: halves that lie VL/2 apart first.
#if VL == 16 && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#elif VL == 16 && defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
static INLINE void sums16(const vf* x, float* to) {
#ifdef PICK
    vf a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] = PICK(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               PICK(x[2 * i], x[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        b[i] = PICK(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               PICK(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        c[i] = PICK(b[2 * i], b[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               PICK(b[2 * i], b[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    store(to, PICK(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                  PICK(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
#else
    for (int i = 0; i < 16; i++) to[i] = sum(x[i]);
#endif
}

// Attention of one token's query heads that share a key-value head, over keys first .. last, `step` floats apart. q [group,D] with
// heads q_head apart -> out [group,D]. D is a multiple of VL; `scores` has room for the keys, rounded up to 16. Nothing seen gives 0.
static inline void attend(const float* q, int64_t q_head, const float* keys, const float* values, int64_t step, int64_t first, int64_t last,
                          int64_t group, int64_t D, float scale, float cap, float* out, float* scores) {
    if (last <= first) {
        memset(out, 0, group * D * 4);
        return;
    }
    const int64_t seen = last - first, padded = round_up(seen, 16);
    constexpr float LOG2E = 1.44269504088896341f;
    keys += first * step;
    values += first * step;
    for (int64_t h = 0; h < group; h++) {
        const float* own = q + h * q_head;
        for (int64_t j = 0; j < seen; j += 16) {
            vf total[16] = {};
            const float* row[16];
            for (int64_t i = 0; i < 16; i++) row[i] = keys + min_(j + i, seen - 1) * step;
            for (int64_t d = 0; d < D; d += VL) {
                const vf x = load(own + d);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) total[i] += x * load(row[i] + d);
            }
            sums16(total, scores + j);
        }
        for (int64_t j = seen; j < padded; j++) scores[j] = -INFINITY;
        vf most = splat(-INFINITY);
        for (int64_t j = 0; j < padded; j += VL) {
            vf y = load(scores + j) * (cap ? scale / cap : scale * LOG2E);
            if (cap) {
                y = tanh_(y) * (cap * LOG2E);
                if (j + VL > seen)
                    for (int64_t i = max_<int64_t>(0, seen - j); i < VL; i++) y[i] = -INFINITY;
            }
            store(scores + j, y);
            most = vmax(y, most);
        }
        const float base = max_of(most);
        vf total{};
        for (int64_t j = 0; j < padded; j += VL) {
            const vf e = exp2_(load(scores + j) - base);
            store(scores + j, e);
            total += e;
        }
        const float share = 1.0f / sum(total);
        for (int64_t d = 0; d < D; d += 4 * VL) {
            vf mixed[4] = {};
            const int64_t parts = min_<int64_t>(4, (D - d) / VL);
            if (parts == 4)
                for (int64_t j = 0; j < seen; j++)
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) mixed[i] += load(values + j * step + d + i * VL) * scores[j];
            else
                for (int64_t j = 0; j < seen; j++)
                    for (int64_t i = 0; i < parts; i++) mixed[i] += load(values + j * step + d + i * VL) * scores[j];
            for (int64_t i = 0; i < parts; i++) store(out + h * D + d + i * VL, mixed[i] * share);
        }
    }
}
