// Cross-entropy of rows of logits, and its gradient in their place; and their entropy.
#include "simd.h"

// z [rows][V], raw logits. Final logits are cap * tanh(scale * z / cap), or scale * z without a cap. loss[r] = log-sum - target's logit.
// With `weights`, z becomes the gradient of sum(weights * loss) with respect to raw logits; without, z is left in an unspecified state.
EXPORT void cross_entropy(float* z, const int64_t* targets, const float* weights, float* loss, int64_t rows, int64_t V, float scale,
                          float cap, int64_t threads) {
    const int64_t full = V / VL * VL, rest = V - full;
    for_each(rows, threads, [=](int64_t r) {
        float* x = z + r * V;
        const float inner = cap ? scale / cap : 1.0f, outer = cap ? cap : scale;
        // The target's tanh is kept apart: the row is overwritten below.
        vf m = splat(-INFINITY);
        for (int64_t i = 0; i < full; i += VL) {
            vf y = load(x + i);
            if (cap) store(x + i, y = tanh_(y * inner));
            m = vmax(y * outer, m);
        }
        if (rest) {
            vf y = load_some(x + full, rest, cap ? 0.0f : NAN);
            if (cap) store_some(x + full, y = tanh_(y * inner), rest);
            for (int64_t i = 0; i < rest; i++) m[i] = y[i] * outer > m[i] ? y[i] * outer : m[i];
        }
        const float top = max_of(m), base = top == -INFINITY ? 0.0f : top, at = x[targets[r]];
        vf t{};
        auto e = [&](vf y) { return exp_(y * outer - base); };
        if (cap || !weights) {
            for (int64_t i = 0; i < full; i += VL) t += e(load(x + i));
            if (rest) {
                vf y = e(load_some(x + full, rest));
                for (int64_t i = 0; i < rest; i++) t[i] += y[i];
            }
        } else {
            for (int64_t i = 0; i < full; i += VL) {
                vf y = e(load(x + i));
                store(x + i, y);
                t += y;
            }
            if (rest) {
                vf y = e(load_some(x + full, rest));
                store_some(x + full, y, rest);
                for (int64_t i = 0; i < rest; i++) t[i] += y[i];
            }
        }
        const float total = sum(t);
        loss[r] = logf(total) + (base - at * outer);
        if (!weights) return;
        const float w = weights[r] * scale, f = w / total;
        if (cap) {
            auto g = [&](vf y) { return e(y) * f * (1.0f - y * y); };
            for (int64_t i = 0; i < full; i += VL) store(x + i, g(load(x + i)));
            if (rest) store_some(x + full, g(load_some(x + full, rest)), rest);
            x[targets[r]] -= w * (1.0f - at * at);
        } else {
            for (int64_t i = 0; i < full; i += VL) store(x + i, load(x + i) * f);
            for (int64_t i = full; i < V; i++) x[i] *= f;
            x[targets[r]] -= w;
        }
    });
}

// Of the same final logits: loss[r] as above, and the entropy of their softmax. With a cap, z is overwritten by the tanh.
EXPORT void entropy(float* z, const int64_t* targets, float* loss, float* entropy, int64_t rows, int64_t V, float scale, float cap,
                    int64_t threads) {
    const int64_t full = V / VL * VL, rest = V - full;
    for_each(rows, threads, [=](int64_t r) {
        float* x = z + r * V;
        const float inner = cap ? scale / cap : 1.0f, outer = cap ? cap : scale;
        vf m = splat(-INFINITY);
        for (int64_t i = 0; i < full; i += VL) {
            vf y = load(x + i);
            if (cap) store(x + i, y = tanh_(y * inner));
            m = vmax(y * outer, m);
        }
        if (rest) {
            vf y = load_some(x + full, rest);
            if (cap) store_some(x + full, y = tanh_(y * inner), rest);
            for (int64_t i = 0; i < rest; i++) m[i] = y[i] * outer > m[i] ? y[i] * outer : m[i];
        }
        const float base = max_of(m);
        vf t{}, s{};  // sums of exp(d) and of exp(d) * d, d = logit - base
        for (int64_t i = 0; i < full; i += VL) {
            vf d = load(x + i) * outer - base, e = exp_(d);
            t += e, s += e * d;
        }
        if (rest) {
            vf d = load_some(x + full, rest) * outer - base, e = exp_(d);
            for (int64_t i = 0; i < rest; i++) t[i] += e[i], s[i] += e[i] * d[i];
        }
        const float total = sum(t), log_total = logf(total);
        loss[r] = log_total + (base - x[targets[r]] * outer);
        entropy[r] = log_total - sum(s) / total;
    });
}
