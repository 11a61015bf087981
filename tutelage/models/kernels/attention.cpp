// Causal attention inside segments, forward and backward, in blocks that stay in the first- and second-level cache
// (the method of FlashAttention: Dao et al., arXiv 2205.14135; nothing of size tokens x tokens is stored).
//
// One unit of work is one segment and one key-value head (forward: and a range of its queries); segments never meet, so packed
// rows cost what their segments cost. Inside a unit everything is copied to contiguous blocks: keys and values also transposed,
// in panels of NT tokens, so that every matrix product is "broadcast one number of A, multiply a vector of B".
// Scores are kept in units of log 2, so that 2^x serves for e^x.
#include <vector>

#include "heads.h"

namespace {

#if VL == 16 || !defined(__AVX__)
constexpr int MR = 8, NV = 2;  // 32 vector registers: 16 accumulators
#else
constexpr int MR = 4, NV = 2;  // 16 vector registers
#endif
constexpr int64_t NT = NV * VL, BQ = 64, BK = 64;
constexpr int64_t QUERIES_PER_UNIT = 512;

struct View {
    const float* p;
    int64_t row, token, head;
    const float* at(int64_t b, int64_t t, int64_t h) const { return p + b * row + t * token + h * head; }
};
struct Out {
    float* p;
    int64_t row, token, head;
    float* at(int64_t b, int64_t t, int64_t h) const { return p + b * row + t * token + h * head; }
};

// C[MR][N * VL] = sum over k of A[r * ra + k * ka] * B[k * ldb + ..], handed to `done` in registers.
template <int N, class Done>
INLINE void tile(int64_t K, const float* A, int64_t ra, int64_t ka, const float* B, int64_t ldb, const Done& done) {
    vf c[MR][N] = {};
    for (int64_t k = 0; k < K; k++) {
        vf b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) b[n] = load(B + n * VL);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            vf a = splat(A[r * ra]);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) c[r][n] += a * b[n];
        }
        A += ka;
        B += ldb;
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) done(r, n, c[r][n]);
}

// C[MR][DP] (row length DP) = C * keep[r] + A B, or C + A B without keep.
INLINE void accumulate(int64_t K, const float* A, int64_t ra, int64_t ka, const float* B, float* C, int64_t DP, const float* keep) {
    int64_t d = 0;
    for (; d + NT <= DP; d += NT)
        tile<NV>(K, A, ra, ka, B + d, DP, [&](int r, int n, vf x) {
            float* c = C + r * DP + d + n * VL;
            store(c, keep ? load(c) * keep[r] + x : load(c) + x);
        });
    for (; d < DP; d += VL)
        tile<1>(K, A, ra, ka, B + d, DP, [&](int r, int n, vf x) {
            float* c = C + r * DP + d + n * VL;
            store(c, keep ? load(c) * keep[r] + x : load(c) + x);
        });
}

// Rows [n][DP] to panels of NT rows, each [DP][NT]. n is a multiple of NT.
void transpose(const float* from, float* to, int64_t n, int64_t DP) {
    typedef float v4 __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
    typedef int32_t i4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i4{__VA_ARGS__})
#endif
    for (int64_t p = 0; p < n; p += NT)
        for (int64_t d = 0; d < DP; d += 4)
            for (int64_t j = 0; j < NT; j += 4) {
                v4 a, b, c, e;
                const float* f = from + (p + j) * DP + d;
                memcpy(&a, f, 16), memcpy(&b, f + DP, 16), memcpy(&c, f + 2 * DP, 16), memcpy(&e, f + 3 * DP, 16);
                v4 x = SHUFFLE(a, b, 0, 4, 1, 5), y = SHUFFLE(c, e, 0, 4, 1, 5);
                v4 z = SHUFFLE(a, b, 2, 6, 3, 7), w = SHUFFLE(c, e, 2, 6, 3, 7);
                v4 r0 = SHUFFLE(x, y, 0, 1, 4, 5), r1 = SHUFFLE(x, y, 2, 3, 6, 7);
                v4 r2 = SHUFFLE(z, w, 0, 1, 4, 5), r3 = SHUFFLE(z, w, 2, 3, 6, 7);
                float* t = to + p * DP + d * NT + j;
                memcpy(t, &r0, 16), memcpy(t + NT, &r1, 16), memcpy(t + 2 * NT, &r2, 16), memcpy(t + 3 * NT, &r3, 16);
            }
}

struct Problem {
    View q, k, v;
    int64_t T, Hq, Hkv, D, DP, group, window;  // window 0: unlimited
    float scale, cap;                           // cap 0: none
    HeadPrep q_prep, k_prep;
    int threads;

    float query_factor() const { return cap ? scale / cap : scale * 1.44269504088896341f; }
    // What a raw product of packed queries and keys becomes: a score in units of log 2.
    float cap_factor() const { return cap * 1.44269504088896341f; }
    int64_t first_key(int64_t i) const { return window ? max_<int64_t>(0, i - window + 1) : 0; }
};

struct Span {
    int32_t row, start, length;
};

// Rows first..last of a segment's head to to[DP], prepared; zeros up to `padded` rows.
void pack(const View& x, const HeadPrep& prep, int64_t D, int64_t DP, const Span& s, int64_t head, int64_t first, int64_t last,
          int64_t padded, float mul, float* to) {
    for (int64_t i = first; i < last; i++, to += DP) {
        prep.apply(x.at(s.row, s.start + i, head), to, D, s.row, s.start + i, mul);
        for (int64_t d = D; d < DP; d++) to[d] = 0;
    }
    memset(to, 0, (padded - (last - first)) * DP * 4);
}

struct Unit {
    int64_t span, head, first, last;
};

// Running softmax of a query block: the largest score so far, and the sum of 2^(score - largest), lane by lane.
struct Running {
    float top[BQ];
    vf total[BQ];
    float keep[BQ];  // what the newest block makes of earlier sums

    void reset() {
        for (int64_t r = 0; r < BQ; r++) top[r] = -INFINITY, total[r] = vf{}, keep[r] = 0;
    }
};

// Softmax of `rows` rows (at most MR) of one block of scores, in place.
INLINE void online_softmax(float* S, int64_t rows, int64_t lo, int64_t hi, int64_t i0, int64_t j0, const Problem& P, Running& run,
                           int64_t r) {
    const vi lane = iota();
    float next[VL];
    vf before = splat(-INFINITY);
    for (int64_t x = 0; x < VL; x++) next[x] = 0;
    for (int64_t x = 0; x < rows; x++) {
        float* s = S + x * BK;
        const int64_t i = i0 + x;
        const bool edge = j0 + hi - 1 > i || (P.window && j0 + lo <= i - P.window);
        vf m = splat(run.top[r + x]);
        if (!edge && !P.cap) {
            for (int64_t c = lo; c < hi; c += VL) m = vmax(load(s + c), m);
        } else {
            for (int64_t c = lo; c < hi; c += VL) {
                vf y = load(s + c);
                if (P.cap) y = tanh_(y) * P.cap_factor();
                vi j = lane + (int32_t)(j0 + c);
                y = j > (int32_t)i ? splat(-INFINITY) : y;
                if (P.window) y = j <= (int32_t)(i - P.window) ? splat(-INFINITY) : y;
                store(s + c, y);
                m = vmax(y, m);
            }
        }
        const float top = max_of(m);
        before[x] = run.top[r + x];
        run.top[r + x] = top;
        next[x] = top == -INFINITY ? 0.0f : top;  // a row that has seen no key yet
    }
    const vf keep = exp2_(before - load(next));
    for (int64_t x = 0; x < rows; x++) {
        float* s = S + x * BK;
        const vf base = splat(next[x]);
        vf t = run.total[r + x] * keep[x];
        for (int64_t c = lo; c < hi; c += VL) {
            vf e = exp2_(load(s + c) - base);
            store(s + c, e);
            t += e;
        }
        run.total[r + x] = t;
        run.keep[r + x] = keep[x];
    }
}

void forward_unit(const Problem& P, const Span& s, const Unit& u, const Out& out, float* lse) {
    static thread_local Scratch memory;
    const int64_t DP = P.DP, k0 = P.first_key(u.first) / BK * BK, nk = round_up(u.last - k0, BK);
    float* K = memory.get(nk * DP * 2 + BQ * DP * 2 + BQ * BK + BK * DP);
    float *V = K + nk * DP, *Q = V + nk * DP, *O = Q + BQ * DP, *S = O + BQ * DP, *rows = S + BQ * BK;
    Running run;
    for (int64_t j = k0; j < k0 + nk; j += BK) {
        const int64_t last = min_(j + BK, u.last);
        pack(P.k, P.k_prep, P.D, DP, s, u.head, j, last, BK, 1.0f, rows);
        transpose(rows, K + (j - k0) * DP, BK, DP);
        pack(P.v, HeadPrep(), P.D, DP, s, u.head, j, last, BK, 1.0f, V + (j - k0) * DP);
    }
    for (int64_t h = u.head * P.group; h < (u.head + 1) * P.group; h++)
        for (int64_t i0 = u.first; i0 < u.last; i0 += BQ) {
            const int64_t n = min_(BQ, u.last - i0), np = round_up(n, MR);
            pack(P.q, P.q_prep, P.D, DP, s, h, i0, i0 + n, np, P.query_factor(), Q);
            memset(O, 0, np * DP * 4);
            run.reset();
            for (int64_t j0 = P.first_key(i0) / BK * BK; j0 < i0 + n; j0 += BK) {
                const float* Kj = K + (j0 - k0) * DP;
                for (int64_t c = 0; c < BK && j0 + c < i0 + n; c += NT)
                    for (int64_t r = 0; r < np; r += MR) {
                        if (j0 + c > i0 + r + MR - 1 || (P.window && j0 + c + NT - 1 <= i0 + r - P.window)) continue;
                        tile<NV>(P.D, Q + r * DP, DP, 1, Kj + c * DP, NT,
                                 [&](int x, int y, vf value) { store(S + (r + x) * BK + c + y * VL, value); });
                    }
                for (int64_t r = 0; r < np; r += MR) {
                    const int64_t hi = min_(BK, round_up(i0 + r + MR - j0, VL));
                    const int64_t lo = max_<int64_t>(0, P.first_key(i0 + r) - j0) / VL * VL;
                    if (lo >= hi) continue;
                    online_softmax(S + r * BK, min_<int64_t>(MR, n - r), lo, hi, i0 + r, j0, P, run, r);
                    accumulate(hi - lo, S + r * BK + lo, BK, 1, V + (j0 - k0 + lo) * DP, O + r * DP, DP, run.keep + r);
                }
            }
            for (int64_t r = 0; r < n; r++) {
                float* to = out.at(s.row, s.start + i0 + r, h);
                const float total = sum(run.total[r]), f = 1.0f / total;
                for (int64_t d = 0; d < P.D; d++) to[d] = O[r * DP + d] * f;
                lse[(s.row * P.Hq + h) * P.T + s.start + i0 + r] = run.top[r] + log2f(total);
            }
        }
}

// Probabilities and score gradients of one block: Pr = 2^(score - lse), G = Pr * (dO V^T - delta), per natural score before the cap.
template <bool capped>
INLINE void block_gradient(const Problem& P, const float* Q, const float* dO, const float* KT, const float* VT, const float* lse,
                           const float* delta, int64_t i0, int64_t np, int64_t j0, int64_t end, float* Pr, float* G) {
    const vi lane = iota();
    for (int64_t c = 0; c < BK && j0 + c < end; c += NT)
        for (int64_t r = 0; r < np; r += MR) {
            if (j0 + c > i0 + r + MR - 1 || (P.window && j0 + c + NT - 1 <= i0 + r - P.window)) continue;
            const bool edge = j0 + c + NT - 1 > i0 + r || (P.window && j0 + c <= i0 + r + MR - 1 - P.window);
            tile<NV>(P.D, Q + r * P.DP, P.DP, 1, KT + c * P.DP, NT, [&](int x, int y, vf value) {
                float* at = Pr + (r + x) * BK + c + y * VL;
                if (capped) {
                    vf t = tanh_(value);
                    store(G + (at - Pr), 1.0f - t * t);
                    value = t * P.cap_factor();
                }
                vf p = exp2_(value - lse[r + x]);
                if (edge) {
                    const int32_t i = (int32_t)(i0 + r + x);
                    vi j = lane + (int32_t)(j0 + c + y * VL);
                    p = j > i ? vf{} : p;
                    if (P.window) p = j <= i - (int32_t)P.window ? vf{} : p;
                }
                store(at, p);
            });
            tile<NV>(P.D, dO + r * P.DP, P.DP, 1, VT + c * P.DP, NT, [&](int x, int y, vf value) {
                const int64_t at = (r + x) * BK + c + y * VL;
                vf g = load(Pr + at) * (value - delta[r + x]);
                store(G + at, capped ? g * load(G + at) : g);
            });
        }
}

struct Gradients {
    View out, d_out;
    Out dq, dk, dv;
    const float* lse;
    float* d_weights;  // [units][2][D], or none
};

void backward_unit(const Problem& P, const Gradients& g, const Span& s, int64_t head, float* d_weights) {
    static thread_local Scratch memory;
    const int64_t DP = P.DP, n = s.length, np = round_up(n, BK), block = np * DP;
    float* K = memory.get(block * 8 + np * 2 + 2 * BQ * BK);
    float *KT = K + block, *VT = KT + block, *dK = VT + block, *dV = dK + block, *Q = dV + block, *dO = Q + block, *dQ = dO + block;
    float *delta = dQ + block, *lse = delta + np, *Pr = lse + np, *G = Pr + BQ * BK;
    const HeadPrep none;
    pack(P.v, none, P.D, DP, s, head, 0, n, np, 1.0f, K);
    transpose(K, VT, np, DP);
    pack(P.k, P.k_prep, P.D, DP, s, head, 0, n, np, 1.0f, K);
    transpose(K, KT, np, DP);
    memset(dK, 0, block * 8);
    for (int64_t h = head * P.group; h < (head + 1) * P.group; h++) {
        pack(P.q, P.q_prep, P.D, DP, s, h, 0, n, np, P.query_factor(), Q);
        pack(g.d_out, none, P.D, DP, s, h, 0, n, np, 1.0f, dO);
        memset(dQ, 0, block * 4);
        for (int64_t i = 0; i < np; i++) {
            delta[i] = lse[i] = 0;
            if (i >= n) continue;
            const float* o = g.out.at(s.row, s.start + i, h);
            float t = 0;
            vf tv{};
            int64_t d = 0;
            for (; d + VL <= P.D; d += VL) tv += load(o + d) * load(dO + i * DP + d);
            for (; d < P.D; d++) t += o[d] * dO[i * DP + d];
            delta[i] = t + sum(tv);
            lse[i] = g.lse[(s.row * P.Hq + h) * P.T + s.start + i];
        }
        for (int64_t j0 = 0; j0 < n; j0 += BK) {
            const int64_t stop = P.window ? min_(n, j0 + BK - 1 + P.window) : n;
            for (int64_t i0 = j0; i0 < stop; i0 += BQ) {
                const int64_t m = min_(BQ, n - i0), mp = round_up(m, MR);
                const float *Qi = Q + i0 * DP, *dOi = dO + i0 * DP;
                auto block = P.cap ? block_gradient<true> : block_gradient<false>;
                block(P, Qi, dOi, KT + j0 * DP, VT + j0 * DP, lse + i0, delta + i0, i0, mp, j0, min_(n, i0 + m), Pr, G);
                for (int64_t c = 0; c < BK && j0 + c < n; c += MR) {
                    const int64_t lo = max_<int64_t>(0, j0 + c - i0);
                    const int64_t hi = P.window ? min_(m, j0 + c + MR - 1 + P.window - i0) : m;
                    if (lo >= hi) continue;
                    accumulate(hi - lo, Pr + lo * BK + c, 1, BK, dOi + lo * DP, dV + (j0 + c) * DP, DP, nullptr);
                    accumulate(hi - lo, G + lo * BK + c, 1, BK, Qi + lo * DP, dK + (j0 + c) * DP, DP, nullptr);
                }
                for (int64_t r = 0; r < mp; r += MR) {
                    const int64_t lo = max_<int64_t>(0, P.first_key(i0 + r) - j0), hi = min_(BK, i0 + r + MR - j0);
                    if (lo >= hi) continue;
                    accumulate(hi - lo, G + r * BK + lo, BK, 1, K + (j0 + lo) * DP, dQ + (i0 + r) * DP, DP, nullptr);
                }
            }
        }
        for (int64_t i = 0; i < n; i++) {
            float* y = dQ + i * DP;
            for (int64_t d = 0; d < P.D; d++) y[d] *= P.scale;
            P.q_prep.undo(P.q.at(s.row, s.start + i, h), y, g.dq.at(s.row, s.start + i, h), d_weights, P.D, s.row, s.start + i);
        }
    }
    const float factor = P.scale / P.query_factor();
    for (int64_t i = 0; i < n; i++) {
        float* y = dK + i * DP;
        for (int64_t d = 0; d < P.D; d++) y[d] *= factor;
        P.k_prep.undo(P.k.at(s.row, s.start + i, head), y, g.dk.at(s.row, s.start + i, head), d_weights + P.D, P.D, s.row, s.start + i);
        memcpy(g.dv.at(s.row, s.start + i, head), dV + i * DP, P.D * 4);
    }
}

}  // namespace

// Everything both passes need to know. Strides are in floats; the layout is repeated in calls.py.
struct AttentionArguments {
    const float *q, *k, *v;
    int64_t q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head;
    const int32_t* spans;  // [n][3]: row, start, length
    int64_t spans_count, T, Hq, Hkv, D, window;
    const float *q_weight, *k_weight, *cos, *sin;  // each may be none
    int64_t cos_row, rotary;
    float scale, cap, eps, offset;
    int64_t threads;
};

static Problem problem_of(const AttentionArguments& a) {
    Problem P{{a.q, a.q_row, a.q_token, a.q_head}, {a.k, a.k_row, a.k_token, a.k_head}, {a.v, a.v_row, a.v_token, a.v_head},
              a.T, a.Hq, a.Hkv, a.D, round_up(a.D, VL), a.Hq / a.Hkv, a.window, a.scale, a.cap, {}, {}, (int)a.threads};
    P.q_prep.weight = a.q_weight, P.k_prep.weight = a.k_weight;
    for (HeadPrep* p : {&P.q_prep, &P.k_prep}) {
        p->offset = a.offset, p->eps = a.eps, p->cos = a.cos, p->sin = a.sin, p->row_stride = a.cos_row, p->rotary = a.rotary;
    }
    return P;
}

// out [B,T,Hq,D] contiguous, lse [B,Hq,T]; what lies outside the spans is not touched.
EXPORT void attention_forward(const AttentionArguments* a, float* out, float* lse) {
    const Problem P = problem_of(*a);
    const Span* spans = (const Span*)a->spans;
    std::vector<Unit> units;
    for (int64_t s = 0; s < a->spans_count; s++)
        for (int64_t first = 0; first < spans[s].length; first += QUERIES_PER_UNIT)
            for (int64_t h = 0; h < P.Hkv; h++)
                units.push_back({s, h, first, min_<int64_t>(spans[s].length, first + QUERIES_PER_UNIT)});
    const Out o{out, P.T * P.Hq * P.D, P.Hq * P.D, P.D};
    for_each(units.size(), P.threads, [&](int64_t i) { forward_unit(P, spans[units[i].span], units[i], o, lse); });
}

// d_out like out, contiguous. dq, dk, dv have the strides of q, k, v. d_weights [2][D] gets the gradients of the two norm weights.
EXPORT void attention_backward(const AttentionArguments* a, const float* out, const float* lse, const float* d_out, float* dq, float* dk,
                               float* dv, float* d_weights) {
    const Problem P = problem_of(*a);
    const Span* spans = (const Span*)a->spans;
    const View o{out, P.T * P.Hq * P.D, P.Hq * P.D, P.D}, d{d_out, o.row, o.token, o.head};
    const Gradients g{o, d, {dq, a->q_row, a->q_token, a->q_head}, {dk, a->k_row, a->k_token, a->k_head},
                      {dv, a->v_row, a->v_token, a->v_head}, lse, d_weights};
    const int64_t units = a->spans_count * P.Hkv, width = 2 * P.D;
    std::vector<float> partial(units * width, 0.0f);
    for_each(units, P.threads, [&](int64_t i) { backward_unit(P, g, spans[i / P.Hkv], i % P.Hkv, &partial[i * width]); });
    // Summed in the order of the units, so that the number of threads changes nothing.
    for (int64_t j = 0; d_weights && j < width; j++) {
        double t = 0;
        for (int64_t i = 0; i < units; i++) t += partial[i * width + j];
        d_weights[j] = (float)t;
    }
}
