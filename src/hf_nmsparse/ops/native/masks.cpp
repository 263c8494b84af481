// SPDX-License-Identifier: Apache-2.0
// W * M on the CPU, M the soft mask of learned logits, and the gradient of the logits; see mask_sampling.py and the formulas of
// candidate_masks.py and elementwise_masks.py. Each number is read and written once: noise and probabilities live in buffers
// of LANES groups, which fit the first level of the cache. Plain loops over the lanes, which compilers turn into vectors.
//
// Scores are in units of log2: 2^s instead of e^s, so that no constant is multiplied in twice.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

constexpr int LANES = 64;            // groups that are worked on together
constexpr int MOST_CANDIDATES = 28;  // 2:8
constexpr int MOST_POSITIONS = 16;   // m
constexpr int MOST_BRANCHES = 64;    // n (m - n), choices of the walk of elementwise_masks.py
constexpr float LOG2_E = 1.44269504f, NEVER = -1e30f;

#define EACH_LANE for (int l = 0; l < LANES; ++l)
using Plane = float[LANES];

enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
struct bfloat16 {
    uint16_t bits;
};

struct Masks {  // `_Call` of native_masks.py
    const void *logits, *weight, *grad;
    void *result, *grad_logits, *grad_weight;  // null where not wanted
    const unsigned char* candidates;           // [C, m] of 0 and 1, or null: a logit for each weight
    int64_t rows, in_features;
    int n, m, num_candidates;
    Type weight_type, logit_type;
    float slope, inverse_temperature, reward;
    uint32_t seed, layer, step, draw;
    int threads;

    int64_t groups() const { return (in_features + m - 1) / m; }
};

// --- numbers --------------------------------------------------------------------------------------------------------
inline float to_float(float value) { return value; }
inline float to_float(_Float16 value) { return static_cast<float>(value); }
inline float to_float(bfloat16 value) {
    const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}
inline void from_float(float value, float& result) { result = value; }
inline void from_float(float value, _Float16& result) { result = static_cast<_Float16>(value); }
inline void from_float(float value, bfloat16& result) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    result.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// log2 x for normal x > 0, relative error below 1e-7 near 1 too. With x = 2^e (1 + z), 1 + z in [sqrt(1/2), sqrt(2)), it is
// e + z Q(z), Q of least largest relative error.
inline float log2_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23, rest = bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23);
    float z;
    std::memcpy(&z, &rest, 4);
    z -= 1;
    float q = -0.10994948f;
    q = q * z + 0.18617499f;
    q = q * z - 0.19106279f;
    q = q * z + 0.20460062f;
    q = q * z - 0.23961739f;
    q = q * z + 0.28856739f;
    q = q * z - 0.36069664f;
    q = q * z + 0.48089823f;
    q = q * z - 0.72134733f;
    q = q * z + 1.44269502f;
    return q * z + static_cast<float>(exponent);
}

// 2^x for x <= 126; 2^-126 for less.
inline float exp2_of(float x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    x = std::max(x, -126.0f);
    const float whole = (x + shift) - shift, f = x - whole;
    float q = 0.00015345813f;
    q = q * f + 0.001339993f;
    q = q * f + 0.009618489f;
    q = q * f + 0.055503286f;
    q = q * f + 0.24022646f;
    q = q * f + 0.69314718f;
    q = q * f + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &q, 4);
    bits += static_cast<int32_t>(static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23);
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// --- order of numbers -------------------------------------------------------------------------------------------------
// [m][LANES] to [LANES][m] and back.
template <int M>
void to_weights_of(const Plane* planes, float* weights) {
    EACH_LANE for (int j = 0; j < M; ++j) weights[l * M + j] = planes[j][l];
}
void to_weights(int m, const Plane* planes, float* weights) {
    if (m == 4) return to_weights_of<4>(planes, weights);
    for (int j = 0; j < m; ++j) EACH_LANE weights[l * m + j] = planes[j][l];
}
template <int M>
void to_planes_of(const float* weights, Plane* planes) {
    EACH_LANE for (int j = 0; j < M; ++j) planes[j][l] = weights[l * M + j];
}
void to_planes(int m, const float* weights, Plane* planes) {
    if (m == 4) return to_planes_of<4>(weights, planes);
    for (int j = 0; j < m; ++j) EACH_LANE planes[j][l] = weights[l * m + j];
}

// --- noise ----------------------------------------------------------------------------------------------------------
// Adds g / tau, in units of log2, to `count` planes of scores of the groups from `group` on; `gumbel_noise` of philox.py.
void add_noise(const Masks& p, int64_t group, int count, Plane* scores) {
    const float factor = p.inverse_temperature;
    for (int first = 0; first < count; first += 6) {
        uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
        EACH_LANE {
            const uint64_t index = static_cast<uint64_t>(group + l);
            c0[l] = static_cast<uint32_t>(index);
            c1[l] = static_cast<uint32_t>(first / 6) + (static_cast<uint32_t>(index >> 32) << 16);
            c2[l] = p.step;
            c3[l] = p.draw;
        }
        uint32_t k0 = p.seed, k1 = p.layer;
        for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
            EACH_LANE {
                const uint64_t product0 = static_cast<uint64_t>(c0[l]) * 0xD2511F53u;
                const uint64_t product1 = static_cast<uint64_t>(c2[l]) * 0xCD9E8D57u;
                c0[l] = static_cast<uint32_t>(product1 >> 32) ^ c1[l] ^ k0;
                c2[l] = static_cast<uint32_t>(product0 >> 32) ^ c3[l] ^ k1;
                c1[l] = static_cast<uint32_t>(product1);
                c3[l] = static_cast<uint32_t>(product0);
            }
        for (int i = 0; i < 6 && first + i < count; ++i) {
            const uint32_t *x = i == 1 ? c1 : i == 2 || i == 5 ? c2 : i == 3 ? c3 : c0, *y = i == 4 ? c1 : c3;
            float* s = scores[first + i];
            EACH_LANE {
                const uint32_t bits = i < 4 ? x[l] >> 11 : (x[l] & 0x7ff) | (y[l] & 0x3ff) << 11;
                const float u = (static_cast<float>(static_cast<int32_t>(bits)) + 0.5f) * 0x1p-21f;
                s[l] -= log2_of(-log2_of(u)) * factor;  // up to log2(ln 2) / tau, the same for all, which changes nothing
            }
        }
    }
}

// --- a logit for each candidate ---------------------------------------------------------------------------------------
// Probabilities of the candidates, [C][LANES].
template <typename Logit>
void candidate_probabilities(const Masks& p, int64_t row, int64_t group, int count, Plane* y) {
    const int64_t groups = p.groups();
    const float slope = p.slope * LOG2_E;
    for (int c = 0; c < p.num_candidates; ++c) {
        const Logit* logits = static_cast<const Logit*>(p.logits) + (row * p.num_candidates + c) * groups + group;
        if (count == LANES) EACH_LANE y[c][l] = to_float(logits[l]) * slope;
        else EACH_LANE y[c][l] = l < count ? to_float(logits[l]) * slope : 0.0f;
    }
    add_noise(p, row * groups + group, p.num_candidates, y);
    const int64_t tail = p.in_features % p.m;
    if (tail && group + count == groups)  // of the last group: candidates that keep min(n, tail) of its weights
        for (int c = 0; c < p.num_candidates; ++c) {
            int64_t kept = 0;
            for (int64_t j = 0; j < tail; ++j) kept += p.candidates[c * p.m + j];
            bool allowed = kept == std::min<int64_t>(p.n, tail);
            for (int64_t j = tail + p.n - kept; j < p.m; ++j) allowed = allowed && !p.candidates[c * p.m + j];
            if (!allowed) y[c][count - 1] = NEVER;
        }
    Plane largest, sum = {};
    EACH_LANE largest[l] = y[0][l];
    for (int c = 1; c < p.num_candidates; ++c) EACH_LANE largest[l] = std::max(largest[l], y[c][l]);
    for (int c = 0; c < p.num_candidates; ++c)
        EACH_LANE {
            y[c][l] = exp2_of(y[c][l] - largest[l]);
            sum[l] += y[c][l];
        }
    EACH_LANE sum[l] = 1 / sum[l];
    for (int c = 0; c < p.num_candidates; ++c) EACH_LANE y[c][l] *= sum[l];
}

// M, [m][LANES].
void candidate_mask(const Masks& p, const Plane* y, Plane* mask) {
    for (int j = 0; j < p.m; ++j) {
        EACH_LANE mask[j][l] = 0;
        for (int c = 0; c < p.num_candidates; ++c)
            if (p.candidates[c * p.m + j]) EACH_LANE mask[j][l] += y[c][l];
    }
}

// dL/dlogits from dL/dM.
template <typename Logit>
void candidate_gradient(const Masks& p, const Plane* y, const Plane* grad_mask, int64_t row, int64_t group, int count) {
    Plane q[MOST_CANDIDATES], mean = {};
    for (int c = 0; c < p.num_candidates; ++c) {
        EACH_LANE q[c][l] = 0;
        for (int j = 0; j < p.m; ++j)
            if (p.candidates[c * p.m + j]) EACH_LANE q[c][l] += grad_mask[j][l];
        EACH_LANE mean[l] += y[c][l] * q[c][l];
    }
    for (int c = 0; c < p.num_candidates; ++c) {
        Logit* out = static_cast<Logit*>(p.grad_logits) + (row * p.num_candidates + c) * p.groups() + group;
        if (count == LANES) EACH_LANE from_float((q[c][l] - mean[l]) * y[c][l] * p.slope, out[l]);
        else for (int l = 0; l < count; ++l) from_float((q[c][l] - mean[l]) * y[c][l] * p.slope, out[l]);
    }
}

// --- a logit for each weight ------------------------------------------------------------------------------------------
// Element i can be in or out in states [lowest, highest) alone; `conditionals` of elementwise_masks.py explains the walk.
struct Walk {
    int n, m;
    int lowest(int i) const { return std::max(0, n - m + i); }
    int highest(int i) const { return std::min(n, i); }
};

// The probabilities w of each element and state, [branches][LANES], in the order of the walk.
template <typename Logit>
void walk_probabilities(const Masks& p, int64_t row, int64_t group, int count, Plane* w) {
    const Walk walk{p.n, p.m};
    const float slope = p.slope * LOG2_E;
    const int64_t groups = p.groups(), tail = p.in_features % p.m;
    Plane scores[MOST_POSITIONS], ratios[MOST_POSITIONS];
    const Logit* logits = static_cast<const Logit*>(p.logits) + row * p.in_features + group * p.m;
    const int64_t there = std::min<int64_t>(count * p.m, p.in_features - group * p.m);
    float weights[LANES * MOST_POSITIONS];
    for (int64_t i = 0; i < there; ++i) weights[i] = to_float(logits[i]) * slope;
    for (int64_t i = there; i < LANES * p.m; ++i) weights[i] = 0;
    to_planes(p.m, weights, scores);
    add_noise(p, row * groups + group, p.m, scores);
    if (tail && group + count == groups)
        for (int64_t j = tail; j < p.m; ++j) scores[j][count - 1] = static_cast<float>(j - tail + 1) * -1e9f;
    for (int i = 0; i < p.m; ++i) {
        const int low = walk.lowest(i), high = walk.highest(i);
        Plane step[MOST_POSITIONS];
        for (int k = low; k < high; ++k, ++w)
            EACH_LANE {
                const float x = scores[i][l] - ratios[k][l], e = exp2_of(-std::abs(x)), inverse = 1 / (1 + e);
                (*w)[l] = x >= 0 ? inverse : e * inverse;
                step[k][l] = std::max(x, 0.0f) + log2_of(1 + e);
            }
        if (i < p.n) EACH_LANE ratios[i][l] = scores[i][l];
        for (int k = low; k < high; ++k) EACH_LANE ratios[k][l] += step[k][l];
        for (int k = low; k < high && k + 1 < p.n; ++k) EACH_LANE ratios[k + 1][l] -= step[k][l];
    }
}

// M, [m][LANES]: the walk backwards, in state k with probability states[k].
void walk_mask(const Masks& p, const Plane* w, Plane* mask) {
    const Walk walk{p.n, p.m};
    Plane states[MOST_POSITIONS + 1] = {};
    EACH_LANE states[p.n][l] = 1;
    for (int i = 0; i < p.m; ++i) w += walk.highest(i) - walk.lowest(i);
    for (int i = p.m - 1; i >= 0; --i) {
        const int low = walk.lowest(i), high = walk.highest(i);
        w -= high - low;
        EACH_LANE mask[i][l] = 0;
        for (int k = low; k < high; ++k)
            EACH_LANE {
                const float taken = states[k + 1][l] * w[k - low][l];
                mask[i][l] += taken;
                states[k + 1][l] -= taken;
                states[k][l] += taken;
            }
        if (i < p.n)
            EACH_LANE {
                mask[i][l] += states[i + 1][l];
                states[i][l] += states[i + 1][l];
            }
    }
}

// dL/dlogits from dL/dM: the covariance is symmetric, so this is the derivative of M in the direction dL/dM.
template <typename Logit>
void walk_gradient(const Masks& p, const Plane* w, const Plane* grad_mask, int64_t row, int64_t group, int count) {
    const Walk walk{p.n, p.m};
    Plane dw[MOST_BRANCHES], dratios[MOST_POSITIONS], states[MOST_POSITIONS + 1] = {}, dstates[MOST_POSITIONS + 1] = {};
    Plane moved[MOST_POSITIONS];
    int branch = 0;
    for (int i = 0; i < p.m; ++i) {
        const int low = walk.lowest(i), high = walk.highest(i);
        Plane step[MOST_POSITIONS];
        for (int k = low; k < high; ++k, ++branch)
            EACH_LANE {
                step[k][l] = w[branch][l] * (grad_mask[i][l] - dratios[k][l]);
                dw[branch][l] = step[k][l] - w[branch][l] * step[k][l];
            }
        if (i < p.n) EACH_LANE dratios[i][l] = grad_mask[i][l];
        for (int k = low; k < high; ++k) EACH_LANE dratios[k][l] += step[k][l];
        for (int k = low; k < high && k + 1 < p.n; ++k) EACH_LANE dratios[k + 1][l] -= step[k][l];
    }
    EACH_LANE states[p.n][l] = 1;
    for (int i = p.m - 1; i >= 0; --i) {
        const int low = walk.lowest(i), high = walk.highest(i);
        branch -= high - low;
        EACH_LANE moved[i][l] = 0;
        for (int k = low; k < high; ++k)
            EACH_LANE {
                const float chosen = w[branch + k - low][l], taken = states[k + 1][l] * chosen;
                const float dtaken = dstates[k + 1][l] * chosen + states[k + 1][l] * dw[branch + k - low][l];
                moved[i][l] += dtaken;
                states[k + 1][l] -= taken;
                states[k][l] += taken;
                dstates[k + 1][l] -= dtaken;
                dstates[k][l] += dtaken;
            }
        if (i < p.n)
            EACH_LANE {
                moved[i][l] += dstates[i + 1][l];
                states[i][l] += states[i + 1][l];
                dstates[i][l] += dstates[i + 1][l];
            }
    }
    Logit* out = static_cast<Logit*>(p.grad_logits) + row * p.in_features + group * p.m;
    const int64_t there = std::min<int64_t>(count * p.m, p.in_features - group * p.m);
    float weights[LANES * MOST_POSITIONS];
    to_weights(p.m, moved, weights);
    for (int64_t i = 0; i < there; ++i) from_float(weights[i] * p.slope, out[i]);
}

// --- rows -------------------------------------------------------------------------------------------------------------
// `count` groups of a row from `group` on.
template <typename Weight, typename Logit>
void block(const Masks& p, int64_t row, int64_t group, int count) {
    Plane probabilities[std::max(MOST_CANDIDATES, MOST_BRANCHES)], planes[MOST_POSITIONS];
    float mask[LANES * MOST_POSITIONS], grad_mask[LANES * MOST_POSITIONS];
    if (p.candidates) {
        candidate_probabilities<Logit>(p, row, group, count, probabilities);
        candidate_mask(p, probabilities, planes);
    } else {
        walk_probabilities<Logit>(p, row, group, count, probabilities);
        walk_mask(p, probabilities, planes);
    }
    to_weights(p.m, planes, mask);
    const int64_t start = row * p.in_features + group * p.m;
    const int64_t there = std::min<int64_t>(count * p.m, p.in_features - group * p.m);
    const Weight* weight = static_cast<const Weight*>(p.weight) + start;
    if (!p.grad) {
        Weight* result = static_cast<Weight*>(p.result) + start;
        for (int64_t i = 0; i < there; ++i) from_float(to_float(weight[i]) * mask[i], result[i]);
        return;
    }
    const Weight* grad = static_cast<const Weight*>(p.grad) + start;
    if (p.grad_weight) {
        Weight* grad_weight = static_cast<Weight*>(p.grad_weight) + start;
        for (int64_t i = 0; i < there; ++i) from_float(to_float(grad[i]) * mask[i], grad_weight[i]);
    }
    if (!p.grad_logits) return;
    for (int64_t i = 0; i < there; ++i) {
        const float w = to_float(weight[i]);
        grad_mask[i] = to_float(grad[i]) * w - w * w * mask[i] * p.reward;
    }
    for (int64_t i = there; i < LANES * p.m; ++i) grad_mask[i] = 0;
    to_planes(p.m, grad_mask, planes);
    if (p.candidates) candidate_gradient<Logit>(p, probabilities, planes, row, group, count);
    else walk_gradient<Logit>(p, probabilities, planes, row, group, count);
}

template <typename Weight, typename Logit>
void all_rows(const Masks& p) {
    const int64_t groups = p.groups();
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t row = 0; row < p.rows; ++row)
        for (int64_t group = 0; group < groups; group += LANES)
            block<Weight, Logit>(p, row, group, static_cast<int>(std::min<int64_t>(LANES, groups - group)));
}

template <typename Weight>
void of_logits(const Masks& p) {
    if (p.logit_type == FLOAT32) all_rows<Weight, float>(p);
    else all_rows<Weight, bfloat16>(p);
}

}  // namespace

// W * M, or, with `grad`, the gradients that are wanted.
extern "C" void nmsparse_masked_weight(const Masks* p) {
    if (p->weight_type == FLOAT32) of_logits<float>(*p);
    else if (p->weight_type == BFLOAT16) of_logits<bfloat16>(*p);
    else of_logits<_Float16>(*p);
}
