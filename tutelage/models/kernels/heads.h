// One head's vector on its way into attention: RMS norm with a weight, then rotary positions by halves; and the way back.
#pragma once
#include "simd.h"

struct HeadPrep {
    const float* weight = nullptr;  // [D], or none: no norm
    float offset = 0, eps = 0;      // the norm multiplies by weight + offset
    const float *cos = nullptr, *sin = nullptr;  // [T,R] or [B,T,R], or none: no turning
    int64_t row_stride = 0;         // floats between rows of cos and sin; 0 for [T,R]
    int64_t rotary = 0;             // R

    int64_t at(int64_t row, int64_t token) const { return row * row_stride + token * rotary; }

    float inverse_rms(const float* x, int64_t D) const {
        float s = 0;
        if (D % VL == 0) {
            vf t{};
            for (int64_t d = 0; d < D; d += VL) t += load(x + d) * load(x + d);
            s = sum(t);
        } else {
            for (int64_t d = 0; d < D; d++) s += x[d] * x[d];
        }
        return 1.0f / sqrtf(s / (float)D + eps);
    }

    // y = mul * turn(norm(x)); y may be x.
    void apply(const float* x, float* y, int64_t D, int64_t row, int64_t token, float mul) const {
        if (weight) {
            float r = inverse_rms(x, D) * mul;
            for (int64_t d = 0; d < D; d++) y[d] = x[d] * r * (weight[d] + offset);
        } else {
            for (int64_t d = 0; d < D; d++) y[d] = x[d] * mul;
        }
        if (!cos) return;
        const int64_t h = rotary / 2;
        const float *c = cos + at(row, token), *s = sin + at(row, token);
        float *lo = y, *hi = y + h;
#pragma GCC ivdep
        for (int64_t d = 0; d < h; d++) {
            float a = lo[d], b = hi[d];
            lo[d] = a * c[d] - b * s[d];
            hi[d] = b * c[d + h] + a * s[d + h];
        }
    }

    // dy is the gradient of y (it is overwritten); writes that of x to dx, and adds the weight's to dw.
    void undo(const float* x, float* dy, float* dx, float* dw, int64_t D, int64_t row, int64_t token) const {
        if (cos) {
            const int64_t h = rotary / 2;
            const float *c = cos + at(row, token), *s = sin + at(row, token);
            float *lo = dy, *hi = dy + h;
#pragma GCC ivdep
            for (int64_t d = 0; d < h; d++) {
                float a = lo[d], b = hi[d];
                lo[d] = a * c[d] + b * s[d + h];
                hi[d] = b * c[d + h] - a * s[d];
            }
        }
        if (!weight) {
            for (int64_t d = 0; d < D; d++) dx[d] = dy[d];
            return;
        }
        float r = inverse_rms(x, D), dot = 0;
        if (D % VL == 0) {
            vf t{};
            for (int64_t d = 0; d < D; d += VL) {
                vf xr = load(x + d) * r, g = load(dy + d);
                store(dw + d, load(dw + d) + g * xr);
                g *= load(weight + d) + offset;
                store(dy + d, g);
                t += g * xr;
            }
            dot = sum(t);
        } else {
            for (int64_t d = 0; d < D; d++) {
                float xr = x[d] * r, g = dy[d];
                dw[d] += g * xr;
                dy[d] = g * (weight[d] + offset);
                dot += dy[d] * xr;
            }
        }
        dot /= (float)D;
        for (int64_t d = 0; d < D; d++) dx[d] = r * (dy[d] - x[d] * r * dot);
    }
};
