// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x[M, K] W^T + b on the CPU, W 2:4 as it lies on disk: kept values [N, K/2] row by row, column ids [N, K/8]
// (docs/FORMAT.md). W is never written out; see docs/KERNELS.md, "CPU".
//
// Compiled for the machine it runs on (-march=native), so the paths are chosen by the preprocessor:
//   AMX         from 3 tokens on: amx.inc (16-bit) and amx_integer.inc (int8, int4) up to 32, amx_panels.inc beyond
//   AVX-512     vpexpandw / vpexpandb spread 16 / 32 kept values over 32 / 64 columns in one instruction
//   AVX2        a byte of ids picks a permutation of 4 kept values over 8 columns; arithmetic in float32
//   otherwise   plain C++
//
// Ids are two bits, so whatever their bytes say, a value lands inside its own group of four columns: damaged ids give wrong
// numbers, never an access out of bounds. Reads at the end of a row are masked or counted.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WITH_AVX512 1
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
#define WITH_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__BMI2__)
#define WITH_AVX2 1
#endif

namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };  // of x, y, bias, the scales, and values that are not quantised
enum Kind : int { DENSE = 0, INT8 = 1, INT4 = 2 };

constexpr int64_t SCALE_COLUMNS = 128;  // columns that share a scale
constexpr int64_t BLOCK = 512;          // columns whose ids fill one vector register; x is padded with zeros to a multiple

int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

struct Weight {  // `_Prepared` of cpu.py
    const void* values;
    const uint8_t* ids;
    const void* scale;        // [N, ceil(K / 128)] or null
    const void* input_scale;  // [K] or null
    int64_t out_features, in_features;
    Type type;
    Kind kind;

    int64_t scale_groups() const { return round_up(in_features, SCALE_COLUMNS) / SCALE_COLUMNS; }
    int64_t padded_features() const { return round_up(in_features, BLOCK); }
};

struct Problem : Weight {
    const void* x;
    const void* bias;  // [N] or null
    void* y;
    int64_t tokens;
    int threads;
};

// --- numbers --------------------------------------------------------------------------------------------------------
float from_bf16(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float load_as_float(const void* data, int64_t index, Type type) {
    if (type == FLOAT32) return static_cast<const float*>(data)[index];
    if (type == BFLOAT16) return from_bf16(static_cast<const uint16_t*>(data)[index]);
    return static_cast<float>(static_cast<const _Float16*>(data)[index]);
}

void store_float(void* data, int64_t index, float value, Type type) {
    if (type == FLOAT32) static_cast<float*>(data)[index] = value;
    else if (type == BFLOAT16) static_cast<uint16_t*>(data)[index] = to_bf16(value);
    else static_cast<_Float16*>(data)[index] = static_cast<_Float16>(value);
}

void store_output(const Problem& p, int64_t token, int64_t row, float sum) {
    if (p.bias) sum += load_as_float(p.bias, row, p.type);
    store_float(p.y, token * p.out_features + row, sum, p.type);
}

// A buffer of one thread, kept from call to call and grown when needed. Never shrinks: the largest call of a model comes back.
class Scratch {
   public:
    ~Scratch() { std::free(data_); }
    template <typename T>
    T* get(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            size_ = data_ ? bytes : 0;
        }
        return static_cast<T*>(data_);
    }

   private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

thread_local Scratch scratch_of_call;    // what the calling thread prepares for all: x in the form of the path
thread_local Scratch scratch_of_thread;  // what each thread needs of its own

// Rows in portions, taken by whichever thread is free. `work(first, last)` with first a multiple of `unit`.
template <typename Work>
void over_rows(const Problem& p, int64_t unit, const Work& work) {
    const int64_t rows = p.out_features;
    const int64_t small = 1 << 16;  // weights; below, waking other threads costs more than they bring
    const int threads = rows * p.in_features * p.tokens < small ? 1 : p.threads;
    if (threads <= 1) {
        work(0, rows);
        return;
    }
    const int64_t units = (rows + unit - 1) / unit;
    const int64_t portion = std::max<int64_t>(1, units / (threads * 4)) * unit;
    const int64_t portions = (rows + portion - 1) / portion;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < portions; ++i) work(i * portion, std::min(rows, (i + 1) * portion));
}

// x * input_scale as float32, each row padded with zeros.
const float* inputs_as_float(const Problem& p, Scratch& scratch) {
    const int64_t padded = p.padded_features();
    float* out = scratch.get<float>(p.tokens * padded);
    if (!out) return nullptr;
    for (int64_t token = 0; token < p.tokens; ++token) {
        float* row = out + token * padded;
        for (int64_t k = 0; k < p.in_features; ++k) {
            row[k] = load_as_float(p.x, token * p.in_features + k, p.type);
            if (p.input_scale) row[k] *= load_as_float(p.input_scale, k, p.type);
        }
        std::fill(row + p.in_features, row + padded, 0.0f);
    }
    return out;
}

#include "float32.inc"
#include "avx512.inc"
#include "unpack.inc"
#include "amx.inc"
#include "amx_integer.inc"
#include "amx_panels.inc"

// --- entry ----------------------------------------------------------------------------------------------------------
bool run(const Problem& p) {
#if WITH_AVX512
    if (p.type == BFLOAT16) {
#if WITH_AMX
        if (p.tokens > 2 && amx_allowed()) return amx_linear(p);
#endif
        if (p.tokens == 1 && p.kind != DENSE) return avx512_integer_linear(p);
        return avx512_linear(p);
    }
#endif
    return float32_linear(p);
}

}  // namespace

extern "C" {

// What `nmsparse doctor` and tables of times call this build.
const char* nmsparse_instructions() {
#if WITH_AMX
    return amx_allowed() ? "amx" : "avx512";
#elif WITH_AVX512
    return "avx512";
#elif WITH_AVX2
    return "avx2";
#else
    return "plain";
#endif
}

// Returns 0, or 1 if memory ran out.
int nmsparse_linear24(const void* weight, const void* x, const void* bias, void* y, int64_t tokens, int threads) {
    const Problem p{*static_cast<const Weight*>(weight), x, bias, y, tokens, threads};
    return run(p) ? 0 : 1;
}

// The dense weight [N, K] in the type of the layer.
void nmsparse_unpack24(const void* weight, void* dense, int threads) {
    unpack(Problem{*static_cast<const Weight*>(weight), nullptr, nullptr, dense, 1, threads});
}
}
