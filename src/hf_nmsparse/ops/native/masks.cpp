// SPDX-License-Identifier: Apache-2.0
// W * M on the CPU, M the soft mask of learned logits, and the gradient of the logits; see mask_sampling.py and the formulas of
// candidate_masks.py and elementwise_masks.py. Each number is read and written once: a lane of a vector belongs to a group, and
// what belongs to a few groups stays in registers, or in the first level of the cache for the larger patterns.
//
// Scores are in units of log2: 2^s instead of e^s, so that no constant is multiplied in twice.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#include "vectors.inc"

constexpr int MOST_CANDIDATES = 28;  // 2:8
constexpr int MOST_POSITIONS = 16;   // m
constexpr int MOST_BRANCHES = 64;    // n (m - n), choices of the walk of elementwise_masks.py
constexpr float LOG2_E = 1.44269504f, NEVER = -1e30f;

struct Masks {  // `_Masks` of native_masks.py
    const void *logits, *weight, *grad;
    void *result, *grad_logits, *grad_weight;  // null where not wanted
    const unsigned char* candidates;           // [num_candidates, m] of 0 and 1, or null: more than MOST_CANDIDATES
    int64_t rows, in_features;
    int n, m, num_candidates, elementwise;
    Type weight_type, logit_type;
    float slope, inverse_temperature, reward;
    uint32_t seed, layer, step, draw;
    int threads;

    int64_t groups() const { return (in_features + m - 1) / m; }
    int64_t tail() const { return in_features % m; }
};

// Up to LANES groups of a row, from `group` on.
struct Place {
    int64_t row, group, count;
    int64_t weight(const Masks& p) const { return row * p.in_features + group * p.m; }
    int64_t weights(const Masks& p) const { return std::min(count * p.m, p.in_features - group * p.m); }
    bool has_tail(const Masks& p) const { return p.tail() && group + count == p.groups(); }
};

// --- patterns ---------------------------------------------------------------------------------------------------------
// n, m and the candidates: known when this is compiled, so that loops over them leave nothing but sums of registers, or not.
constexpr int binomial(int n, int k) { return k == 0 ? 1 : binomial(n - 1, k - 1) * n / k; }

template <int N, int M>
struct Fixed {
    static constexpr int n = N, m = M, num_candidates = binomial(M, N), width = M, positions = M, candidates = num_candidates;

    static constexpr std::array<int, num_candidates> table() {  // bit j: keeps position j; in the order of combinations
        std::array<int, num_candidates> sorted{};
        int found = 0;
        for (int reversed = (1 << M) - 1; reversed > 0; --reversed) {
            int word = 0, kept = 0;
            for (int j = 0; j < M; ++j)
                if (reversed >> (M - 1 - j) & 1) word |= 1 << j, ++kept;
            if (kept == N) sorted[found++] = word;
        }
        return sorted;
    }
    static constexpr std::array<int, num_candidates> kept = table();
    explicit Fixed(const Masks&) {}
    static constexpr bool keeps(int c, int j) { return kept[c] >> j & 1; }
};

struct Any {
    static constexpr int width = 0, positions = MOST_POSITIONS, candidates = MOST_CANDIDATES;
    int n, m, num_candidates;
    const unsigned char* table;
    explicit Any(const Masks& p) : n(p.n), m(p.m), num_candidates(p.num_candidates), table(p.candidates) {}
    bool keeps(int c, int j) const { return table[c * m + j]; }
};

// Vector k of the weights of a place, in a tensor like the weight; what is beyond the row is 0, and is not written. Patterns that
// are known when this is compiled get whole vectors alone.
template <class Pattern>
INLINE int64_t weights_of_vector(const Masks& p, Place at, int k) {
    return Pattern::width ? LANES : at.weights(p) - k * LANES;
}
template <class Pattern>
INLINE Floats load_weights(Type type, const void* from, const Masks& p, Place at, int k) {
    return load(type, from, at.weight(p) + k * LANES, weights_of_vector<Pattern>(p, at, k));
}
template <class Pattern>
INLINE void store_weights(Floats x, Type type, void* to, const Masks& p, Place at, int k) {
    store(x, type, to, at.weight(p) + k * LANES, weights_of_vector<Pattern>(p, at, k));
}

// body(0), ..., body(count - 1): written out where COUNT, the same number, is known, a loop where it is 0.
template <int COUNT, class Body, int... INDEX>
INLINE void written_out(Body body, std::integer_sequence<int, INDEX...>) {
    (body(INDEX), ...);
}
template <int COUNT, class Body>
INLINE void each(int count, Body body) {
    if constexpr (COUNT > 0) written_out<COUNT>(body, std::make_integer_sequence<int, COUNT>());
    else for (int i = 0; i < count; ++i) body(i);
}
template <class Pattern, class Body>
INLINE void each_position(const Pattern& pattern, Body body) {
    each<Pattern::width>(pattern.m, body);
}
template <class Pattern, class Body>
INLINE void each_candidate(const Pattern& pattern, Body body) {
    each<Pattern::width ? Pattern::candidates : 0>(pattern.num_candidates, body);
}

// --- noise ------------------------------------------------------------------------------------------------------------
// (b + 1/2) 2^11 for the six 21-bit numbers b of each group's Philox block `block`; `gumbel_noise` of philox.py.
template <int WIDTH>
INLINE std::array<Words, 6> random_words(const Masks& p, Place at, uint32_t block) {
    const uint64_t first = static_cast<uint64_t>(at.row * p.groups() + at.group);
    Words c0;
    for (int l = 0; l < LANES; ++l) c0[l] = static_cast<uint32_t>(group_of_lane<WIDTH>(l));
    c0 += static_cast<uint32_t>(first);
    const Words carry = c0 < static_cast<uint32_t>(first) ? Words{} + 1 : Words{};
    Words c1 = ((carry + static_cast<uint32_t>(first >> 32)) << 16) + block, c2 = Words{} + p.step, c3 = Words{} + p.draw;
    philox(p.seed, p.layer, c0, c1, c2, c3);
    const auto upper = [](Words x) INLINE_BODY { return (x & 0xfffff800u) | 0x400; };
    const auto lower = [](Words x, Words y) INLINE_BODY { return ((x << 11) & 0x3ff800u) | (y << 22) | 0x400; };
    return {upper(c0), upper(c1), upper(c2), upper(c3), lower(c0, c1), lower(c2, c3)};
}

// Makes of `count` logits of each group scores, in units of log2: with slope and noise, but for log2(ln 2) / tau, the same for
// all, which changes nothing. COUNT is the same number, or 0; at most 6.
template <int WIDTH, int COUNT>
INLINE void perturb(const Masks& p, Place at, int count, Floats* scores) {
    const float slope = p.slope * LOG2_E;
    for (int first = 0; first < count; first += 6) {
        const std::array<Words, 6> words = random_words<WIDTH>(p, at, static_cast<uint32_t>(first / 6));
        each<COUNT>(std::min(6, count - first), [&](int i) INLINE_BODY {
            scores[first + i] = perturbed(scores[first + i], slope, words[i], p.inverse_temperature);
        });
    }
}

// --- candidates -------------------------------------------------------------------------------------------------------
// Takes candidates from the last group of a row that its tail may not use: all that keep a weight of the tail less than they
// could, and of those with too few weights all but the one that keeps the next positions.
void forbid(const Masks& p, const Any& pattern, Place at, Floats* scores) {
    const int64_t tail = p.tail(), kept = std::min<int64_t>(p.n, tail);
    Floats penalty = {};
    penalty[at.count - 1] = NEVER;
    for (int c = 0; c < pattern.num_candidates; ++c) {
        int64_t mine = 0;
        for (int64_t j = 0; j < tail; ++j) mine += pattern.keeps(c, static_cast<int>(j));
        bool allowed = mine == kept;
        for (int64_t j = tail + p.n - kept; j < p.m; ++j) allowed = allowed && !pattern.keeps(c, static_cast<int>(j));
        if (!allowed) scores[c] = penalty < 0.0f ? penalty : scores[c];
    }
}

// The score of a candidate: the sum of those of the positions it keeps.
template <class Pattern>
INLINE void sums_of_kept(const Pattern& pattern, const Floats* positions, Floats* candidates) {
    each_candidate(pattern, [&](int c) INLINE_BODY {
        candidates[c] = Floats{};
        each_position(pattern, [&](int j) INLINE_BODY { if (pattern.keeps(c, j)) candidates[c] += positions[j]; });
    });
}

// Of each position the sum over the candidates that keep it.
template <class Pattern>
INLINE void sums_of_keepers(const Pattern& pattern, const Floats* candidates, Floats* positions) {
    each_position(pattern, [&](int j) INLINE_BODY {
        positions[j] = Floats{};
        each_candidate(pattern, [&](int c) INLINE_BODY { if (pattern.keeps(c, j)) positions[j] += candidates[c]; });
    });
}

template <class Shape, Type WEIGHT_TYPE = ANY_TYPE, Type LOGIT_TYPE = ANY_TYPE>
struct Candidates {
    using Pattern = Shape;
    static constexpr int WIDTH = Pattern::width, COUNT = WIDTH ? Pattern::candidates : 0;
    Floats y[Pattern::candidates];  // their probabilities

    static Type weight_type(const Masks& p) { return WEIGHT_TYPE == ANY_TYPE ? p.weight_type : WEIGHT_TYPE; }
    static Type logit_type(const Masks& p) { return LOGIT_TYPE == ANY_TYPE ? p.logit_type : LOGIT_TYPE; }

    INLINE void sample(const Masks& p, const Pattern& pattern, Place at) {
        if (p.elementwise) {
            Floats logits[Pattern::positions], scores[Pattern::positions];
            each_position(pattern, [&](int k) INLINE_BODY {
                logits[k] = load_weights<Pattern>(logit_type(p), p.logits, p, at, k);
            });
            to_planes<WIDTH>(pattern.m, logits, scores);
            perturb<WIDTH, WIDTH>(p, at, pattern.m, scores);
            sums_of_kept(pattern, scores, y);
        } else {
            const int64_t first = at.row * pattern.num_candidates * p.groups() + at.group;
            const int64_t count = WIDTH ? LANES : at.count;
            each_candidate(pattern, [&](int c) INLINE_BODY {
                y[c] = regrouped<WIDTH>(load(logit_type(p), p.logits, first + c * p.groups(), count));
            });
            perturb<WIDTH, COUNT>(p, at, pattern.num_candidates, y);
        }
        if constexpr (!WIDTH)
            if (at.has_tail(p)) forbid(p, pattern, at, y);
        Floats largest = y[0], sum = {};
        each_candidate(pattern, [&](int c) INLINE_BODY { largest = larger(largest, y[c]); });
        each_candidate(pattern, [&](int c) INLINE_BODY { sum += y[c] = exp2_of(y[c] - largest); });
        sum = 1 / sum;
        each_candidate(pattern, [&](int c) INLINE_BODY { y[c] *= sum; });
    }

    INLINE void mask(const Pattern& pattern, Floats* planes) const { sums_of_keepers(pattern, y, planes); }

    // Stores dL/dlogits, from dL/dM as planes.
    INLINE void gradient(const Masks& p, const Pattern& pattern, Place at, const Floats* grad_mask) const {
        Floats scores[Pattern::candidates], mean = {};
        sums_of_kept(pattern, grad_mask, scores);
        each_candidate(pattern, [&](int c) INLINE_BODY { mean += y[c] * scores[c]; });
        each_candidate(pattern, [&](int c) INLINE_BODY { scores[c] = (scores[c] - mean) * y[c] * p.slope; });
        if (p.elementwise) {
            Floats planes[Pattern::positions], weights[Pattern::positions];
            sums_of_keepers(pattern, scores, planes);
            to_weights<WIDTH>(pattern.m, planes, weights);
            each_position(pattern, [&](int k) INLINE_BODY {
                store_weights<Pattern>(weights[k], logit_type(p), p.grad_logits, p, at, k);
            });
        } else {
            const int64_t first = at.row * pattern.num_candidates * p.groups() + at.group;
            const int64_t count = WIDTH ? LANES : at.count;
            each_candidate(pattern, [&](int c) INLINE_BODY {
                store(regrouped<WIDTH>(scores[c]), logit_type(p), p.grad_logits, first + c * p.groups(), count);
            });
        }
    }
};

// --- a logit for each weight, many candidates -------------------------------------------------------------------------
// Element i can be in or out in states [lowest, highest) alone; `conditionals` of elementwise_masks.py explains the walk.
struct Walk {
    using Pattern = Any;
    Floats w[MOST_BRANCHES];  // the probabilities of each element and state, in the order of the walk

    static int lowest(const Any& pattern, int i) { return std::max(0, pattern.n - pattern.m + i); }
    static int highest(const Any& pattern, int i) { return std::min(pattern.n, i); }

    static Type weight_type(const Masks& p) { return p.weight_type; }

    void sample(const Masks& p, const Any& pattern, Place at) {
        const int n = pattern.n, m = pattern.m;
        Floats logits[MOST_POSITIONS], scores[MOST_POSITIONS], ratios[MOST_POSITIONS];
        for (int k = 0; k < m; ++k) logits[k] = load_weights<Pattern>(p.logit_type, p.logits, p, at, k);
        to_planes<0>(m, logits, scores);
        perturb<0, 0>(p, at, m, scores);
        if (at.has_tail(p))
            for (int64_t j = p.tail(); j < m; ++j) scores[j][at.count - 1] = static_cast<float>(j - p.tail() + 1) * -1e9f;
        Floats* branch = w;
        for (int i = 0; i < m; ++i) {
            const int low = lowest(pattern, i), high = highest(pattern, i);
            Floats step[MOST_POSITIONS];
            for (int k = low; k < high; ++k, ++branch) {
                const Floats x = scores[i] - ratios[k], distance = x < 0.0f ? x : -x;
                const Floats e = exp2_of(distance), inverse = 1 / (1 + e);
                *branch = x >= 0.0f ? inverse : e * inverse;
                step[k] = larger(x, Floats{}) + log2_of(1 + e);
            }
            if (i < n) ratios[i] = scores[i];
            for (int k = low; k < high; ++k) ratios[k] += step[k];
            for (int k = low; k < high && k + 1 < n; ++k) ratios[k + 1] -= step[k];
        }
    }

    // The walk backwards, in state k with probability states[k].
    void mask(const Any& pattern, Floats* planes) const {
        Floats states[MOST_POSITIONS + 1] = {};
        states[pattern.n] = all(1);
        const Floats* branch = w + pattern.n * (pattern.m - pattern.n);
        for (int i = pattern.m - 1; i >= 0; --i) {
            const int low = lowest(pattern, i), high = highest(pattern, i);
            branch -= high - low;
            planes[i] = Floats{};
            for (int k = low; k < high; ++k) {
                const Floats taken = states[k + 1] * branch[k - low];
                planes[i] += taken;
                states[k + 1] -= taken;
                states[k] += taken;
            }
            if (i < pattern.n) {
                planes[i] += states[i + 1];
                states[i] += states[i + 1];
            }
        }
    }

    // The covariance is symmetric, so dL/dlogits is the derivative of M in the direction dL/dM.
    void gradient(const Masks& p, const Any& pattern, Place at, const Floats* grad_mask) const {
        const int n = pattern.n, m = pattern.m;
        Floats dw[MOST_BRANCHES], dratios[MOST_POSITIONS], states[MOST_POSITIONS + 1] = {}, dstates[MOST_POSITIONS + 1] = {};
        int branch = 0;
        for (int i = 0; i < m; ++i) {
            const int low = lowest(pattern, i), high = highest(pattern, i);
            Floats step[MOST_POSITIONS];
            for (int k = low; k < high; ++k, ++branch) {
                step[k] = w[branch] * (grad_mask[i] - dratios[k]);
                dw[branch] = step[k] - w[branch] * step[k];
            }
            if (i < n) dratios[i] = grad_mask[i];
            for (int k = low; k < high; ++k) dratios[k] += step[k];
            for (int k = low; k < high && k + 1 < n; ++k) dratios[k + 1] -= step[k];
        }
        Floats moved[MOST_POSITIONS], weights[MOST_POSITIONS];
        states[n] = all(1);
        for (int i = m - 1; i >= 0; --i) {
            const int low = lowest(pattern, i), high = highest(pattern, i);
            branch -= high - low;
            moved[i] = Floats{};
            for (int k = low; k < high; ++k) {
                const Floats chosen = w[branch + k - low], taken = states[k + 1] * chosen;
                const Floats dtaken = dstates[k + 1] * chosen + states[k + 1] * dw[branch + k - low];
                moved[i] += dtaken;
                states[k + 1] -= taken;
                states[k] += taken;
                dstates[k + 1] -= dtaken;
                dstates[k] += dtaken;
            }
            if (i < n) {
                moved[i] += dstates[i + 1];
                states[i] += states[i + 1];
                dstates[i] += dstates[i + 1];
            }
        }
        to_weights<0>(m, moved, weights);
        for (int k = 0; k < m; ++k) store_weights<Pattern>(weights[k] * p.slope, p.logit_type, p.grad_logits, p, at, k);
    }
};

// --- rows -------------------------------------------------------------------------------------------------------------
template <class Sampler>
INLINE void groups_at(const Masks& p, const typename Sampler::Pattern& pattern, Place at) {
    using Pattern = typename Sampler::Pattern;
    const Type type = Sampler::weight_type(p);
    Floats planes[Pattern::positions], mask[Pattern::positions];
    Sampler sampler;
    sampler.sample(p, pattern, at);
    sampler.mask(pattern, planes);
    to_weights<Pattern::width>(pattern.m, planes, mask);
    if (!p.grad) {
        each_position(pattern, [&](int k) INLINE_BODY {
            store_weights<Pattern>(load_weights<Pattern>(type, p.weight, p, at, k) * mask[k], type, p.result, p, at, k);
        });
        return;
    }
    Floats grad_mask[Pattern::positions];
    each_position(pattern, [&](int k) INLINE_BODY {
        const Floats w = load_weights<Pattern>(type, p.weight, p, at, k), a = load_weights<Pattern>(type, p.grad, p, at, k);
        if (p.grad_weight) store_weights<Pattern>(a * mask[k], type, p.grad_weight, p, at, k);
        grad_mask[k] = a * w - w * w * mask[k] * p.reward;
    });
    if (!p.grad_logits) return;
    to_planes<Pattern::width>(pattern.m, grad_mask, planes);
    sampler.gradient(p, pattern, at, planes);
}

// The groups of a row from `first` to `end`.
template <class Sampler>
__attribute__((noinline)) void part_of_row(const Masks& given, int64_t row, int64_t first, int64_t end) {
    [[maybe_unused]] const TinyIsZero guard;
    const Masks p = given;  // a copy that nothing can alias: its numbers stay in registers
    const typename Sampler::Pattern pattern(p);
    for (int64_t group = first; group < end; group += LANES)
        groups_at<Sampler>(p, pattern, {row, group, std::min<int64_t>(LANES, end - group)});
}

// All groups; what is left of a row after whole vectors goes to Rest.
template <class Sampler, class Rest>
void all_rows(const Masks& p) {
    const int64_t groups = p.groups(), whole = Sampler::Pattern::width ? p.in_features / (LANES * p.m) * LANES : groups;
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t row = 0; row < p.rows; ++row) {
        part_of_row<Sampler>(p, row, 0, whole);
        if (whole < groups) part_of_row<Rest>(p, row, whole, groups);
    }
}

template <Type WEIGHT>
void of_24(const Masks& p) {
    if (p.logit_type == FLOAT32) all_rows<Candidates<Fixed<2, 4>, WEIGHT, FLOAT32>, Candidates<Any>>(p);
    else all_rows<Candidates<Fixed<2, 4>, WEIGHT, BFLOAT16>, Candidates<Any>>(p);
}

}  // namespace

// W * M, or, with `grad`, the gradients that are wanted.
extern "C" void nmsparse_masked_weight(const Masks* p) {
    if (!p->candidates) all_rows<Walk, Walk>(*p);
    else if (p->n == 2 && p->m == 4 && p->weight_type == FLOAT32) of_24<FLOAT32>(*p);
    else if (p->n == 2 && p->m == 4 && p->weight_type == BFLOAT16) of_24<BFLOAT16>(*p);
    else all_rows<Candidates<Any>, Candidates<Any>>(*p);
}
