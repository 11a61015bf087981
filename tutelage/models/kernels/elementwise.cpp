// The operations between matrix products. All are bound by memory: one pass over the data, forward and backward.
#include <vector>

#include "heads.h"

namespace {

constexpr int64_t ROWS = 64;  // rows per unit of work
constexpr int64_t PARTS = 64;  // partial sums of a weight's gradient: fixed, so that the number of threads changes nothing

// body(offset, vector load, vector store) over n floats, the last few through padded vectors.
template <class Body>
INLINE void each(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) body(i, [](const float* p) { return load(p); }, [](float* p, vf x) { store(p, x); });
    if (const int64_t rest = n - i)
        body(i, [rest](const float* p) { return load_some(p, rest); }, [rest](float* p, vf x) { store_some(p, x, rest); });
}

// Sums partial[part][width] over the parts, in order, into to[width].
void reduce(const std::vector<float>& partial, int64_t parts, int64_t width, float* to) {
    for (int64_t j = 0; j < width; j++) {
        double t = 0;
        for (int64_t p = 0; p < parts; p++) t += partial[p * width + j];
        to[j] = (float)t;
    }
}

}  // namespace

// y = x / rms(x) * (weight + offset), rows of H; rstd [rows] for the backward pass. With `add`, x + add is normed and goes to `total`.
EXPORT void rms_norm_forward(const float* x, const float* add, const float* weight, float* y, float* total, float* rstd, int64_t rows,
                             int64_t H, float eps, float offset, int64_t threads) {
    for_each((rows + ROWS - 1) / ROWS, threads, [=](int64_t unit) {
        for (int64_t r = unit * ROWS; r < min_(rows, (unit + 1) * ROWS); r++) {
            const float* xr = x + r * H;
            vf s{};
            if (add) {
                float* tr = total + r * H;
                each(H, [&](int64_t i, auto get, auto put) {
                    vf t = get(xr + i) + get(add + r * H + i);
                    put(tr + i, t);
                    s += t * t;
                });
                xr = tr;
            } else {
                each(H, [&](int64_t i, auto get, auto) { s += get(xr + i) * get(xr + i); });
            }
            const float f = 1.0f / sqrtf(sum(s) / (float)H + eps);
            rstd[r] = f;
            each(H, [&](int64_t i, auto get, auto put) { put(y + r * H + i, get(xr + i) * f * (get(weight + i) + offset)); });
        }
    });
}

// dx = gradient through the norm (+ `rest`, the gradient that reached x another way), dweight [H]. dx may be dy or rest.
EXPORT void rms_norm_backward(const float* x, const float* weight, const float* rstd, const float* dy, const float* rest, float* dx,
                              float* dweight, int64_t rows, int64_t H, float offset, int64_t threads) {
    const int64_t size = max_<int64_t>(1, (rows + PARTS - 1) / PARTS), parts = (rows + size - 1) / size;
    std::vector<float> partial(parts * H, 0.0f);
    for_each(parts, threads, [&, x, dy](int64_t part) {
        float* dw = &partial[part * H];
        for (int64_t r = part * size; r < min_(rows, (part + 1) * size); r++) {
            const float *xr = x + r * H, *gr = dy + r * H;
            const float f = rstd[r];
            vf s{};
            each(H, [&](int64_t i, auto get, auto put) {
                vf xf = get(xr + i) * f, g = get(gr + i);
                put(dw + i, get(dw + i) + g * xf);
                s += g * (get(weight + i) + offset) * xf;
            });
            const float dot = sum(s) / (float)H;
            each(H, [&](int64_t i, auto get, auto put) {
                vf d = f * (get(gr + i) * (get(weight + i) + offset) - get(xr + i) * f * dot);
                put(dx + r * H + i, rest ? d + get(rest + r * H + i) : d);
            });
        }
    });
    reduce(partial, parts, H, dweight);
}

// [rows][2I] -> [rows][I]: silu of the first half times the second.
EXPORT void silu_mul_forward(const float* gate_up, float* y, int64_t rows, int64_t I, int64_t threads) {
    for_each((rows + ROWS - 1) / ROWS, threads, [=](int64_t unit) {
        for (int64_t r = unit * ROWS; r < min_(rows, (unit + 1) * ROWS); r++) {
            const float *g = gate_up + r * 2 * I, *u = g + I;
            each(I, [&](int64_t i, auto get, auto put) {
                vf a = get(g + i);
                put(y + r * I + i, a / (1.0f + exp_(-a)) * get(u + i));
            });
        }
    });
}

// Gradient of gate_up, and with `y` the forward result once more (the weight gradient of the product after it needs that).
EXPORT void silu_mul_backward(const float* gate_up, const float* dy, float* d_gate_up, float* y, int64_t rows, int64_t I, int64_t threads) {
    for_each((rows + ROWS - 1) / ROWS, threads, [=](int64_t unit) {
        for (int64_t r = unit * ROWS; r < min_(rows, (unit + 1) * ROWS); r++) {
            const float *g = gate_up + r * 2 * I, *u = g + I;
            float *dg = d_gate_up + r * 2 * I, *du = dg + I;
            each(I, [&](int64_t i, auto get, auto put) {
                vf a = get(g + i), b = get(u + i), d = get(dy + r * I + i);
                vf s = 1.0f / (1.0f + exp_(-a)), silu = a * s;
                put(dg + i, d * b * (s + silu * (1.0f - s)));
                put(du + i, d * silu);
                if (y) put(y + r * I + i, silu * b);
            });
        }
    });
}

// Norm (weight [D], or none) and rotary positions of x [B,T,H,D] (strides in floats) into y, contiguous.
EXPORT void heads_forward(const float* x, int64_t x_row, int64_t x_token, int64_t x_head, float* y, int64_t B, int64_t T, int64_t H,
                          int64_t D, const float* weight, float eps, float offset, const float* cos, const float* sin, int64_t cos_row,
                          int64_t rotary, int64_t threads) {
    const HeadPrep prep{weight, offset, eps, cos, sin, cos_row, rotary};
    for_each((B * T + ROWS - 1) / ROWS, threads, [=](int64_t unit) {
        for (int64_t n = unit * ROWS; n < min_(B * T, (unit + 1) * ROWS); n++)
            for (int64_t h = 0; h < H; h++)
                prep.apply(x + n / T * x_row + n % T * x_token + h * x_head, y + (n * H + h) * D, D, n / T, n % T, 1.0f);
    });
}

// dy is overwritten. dx is contiguous; dweight [D] where there is a weight.
EXPORT void heads_backward(const float* x, int64_t x_row, int64_t x_token, int64_t x_head, float* dy, float* dx, float* dweight, int64_t B,
                           int64_t T, int64_t H, int64_t D, const float* weight, float eps, float offset, const float* cos,
                           const float* sin, int64_t cos_row, int64_t rotary, int64_t threads) {
    const HeadPrep prep{weight, offset, eps, cos, sin, cos_row, rotary};
    const int64_t rows = B * T, size = max_<int64_t>(1, (rows + PARTS - 1) / PARTS), parts = (rows + size - 1) / size;
    std::vector<float> partial(parts * D, 0.0f);
    for_each(parts, threads, [&, x, dy, dx](int64_t part) {
        for (int64_t n = part * size; n < min_(rows, (part + 1) * size); n++)
            for (int64_t h = 0; h < H; h++) {
                const int64_t at = (n * H + h) * D;
                prep.undo(x + n / T * x_row + n % T * x_token + h * x_head, dy + at, dx + at, &partial[part * D], D, n / T, n % T);
            }
    });
    if (dweight) reduce(partial, parts, D, dweight);
}

// to[ids[n]] += from[n], rows of H; ids outside [0, V) are the caller's error. Each unit owns a range of columns, so sums have one order.
EXPORT void embedding_backward(const int64_t* ids, const float* from, float* to, int64_t rows, int64_t H, int64_t threads) {
    const int64_t width = 4 * VL;
    for_each((H + width - 1) / width, threads, [=](int64_t unit) {
        const int64_t first = unit * width, n = min_(width, H - first);
        for (int64_t r = 0; r < rows; r++) {
            const float* f = from + r * H + first;
            float* t = to + ids[r] * H + first;
            each(n, [&](int64_t i, auto get, auto put) { put(t + i, get(t + i) + get(f + i)); });
        }
    });
}
