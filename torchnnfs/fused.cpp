// Forward and backward pass of a chain of dense layers, a tile of samples at a time.
//
// Compiled once for each network, which the compiler gets as
//   WIDTHS   number of inputs, then of neurons of each layer: 2,3,3
//   BIASES   whether it has a bias, for each layer: 1,1
//   RELUS    whether a ReLU follows: 1,0
//   SOFTMAX  whether a softmax ends the chain: 1
//   SCALAR   what input, output and parameters are stored as; REAL: what is computed in.
//
// Inside a tile the data is planar: one row of registers holds one feature of many samples, so that
// each instruction serves as many samples as a register has lanes. Nothing but input and output goes
// through memory; the planes of a tile stay in the first level of the cache. The backward pass
// computes the intermediates of its tile again.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef __linux__
#include <sys/mman.h>
#endif

// A register's bytes; how many registers of samples a tile has; neurons computed at a time. STRIP
// times BLOCK sums, the inputs and a weight fit into the registers there are.
#if defined(__AVX512F__)
constexpr int BYTES = 64, STRIP = 4, BLOCK = 6;
#elif defined(__AVX__)
constexpr int BYTES = 32, STRIP = 2, BLOCK = 4;
#else
constexpr int BYTES = 16, STRIP = 2, BLOCK = 4;
#endif

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
    void operator=(float value) {  // to the nearest, ties to even; NaN stays NaN
        uint32_t wide;
        memcpy(&wide, &value, 4);
        bits = value != value ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    }
};
using Scalar = SCALAR;
using Real = REAL;
constexpr bool SINGLE = sizeof(Real) == 4;
using Whole = std::conditional_t<SINGLE, int32_t, int64_t>;
typedef Real Vector __attribute__((vector_size(BYTES)));
typedef Whole Wholes __attribute__((vector_size(BYTES)));
using Plane = Vector[STRIP];

constexpr int WIDTH[] = {WIDTHS};
constexpr bool BIAS[] = {BIASES}, RELU[] = {RELUS};
constexpr int LAYERS = sizeof(RELU), INPUTS = WIDTH[0], OUTPUTS = WIDTH[LAYERS];
constexpr int TILE = STRIP * BYTES / sizeof(Real);

struct Sizes { int tensors, numbers, planes, widest; int64_t products; };
constexpr Sizes before(int layer) {  // of all layers before this one: parameters, their numbers, inputs
    Sizes s{0, 0, 0, WIDTH[0], SOFTMAX * 16 * OUTPUTS};  // an exponential costs like 16 products
    for (int l = 0; l < layer; ++l) {
        s.tensors += 1 + BIAS[l];
        s.numbers += WIDTH[l + 1] * (WIDTH[l] + BIAS[l]);
        s.planes += WIDTH[l];
        s.widest = WIDTH[l + 1] > s.widest ? WIDTH[l + 1] : s.widest;
        s.products += int64_t(WIDTH[l]) * WIDTH[l + 1];
    }
    return s;
}
constexpr Sizes ALL = before(LAYERS);

// What Python packs; 0 is for what there is not. With a target, the loss is what is derived.
struct Call {
    int64_t samples, threads;
    const Scalar* input;
    Scalar* output;
    const int64_t* target;
    Scalar* loss;
    const Scalar* output_grad;
    Scalar* input_grad;
    const Scalar* parameters[ALL.tensors];  // of each layer the weight, then the bias, if any
    Scalar* grads[ALL.tensors];
};

// What a thread needs: the inputs of all layers and the outputs, the gradients of a layer's input
// and output, and a sum for each number in the parameters, in as many parts as a register has lanes.
struct alignas(BYTES) Workspace {
    Plane inputs[ALL.planes + OUTPUTS], grads[2][ALL.widest];
    Vector sums[ALL.numbers];
    double loss;
    bool backward, valid;
};

#define INLINE static inline __attribute__((always_inline))

// y_j = b_j + sum_i w_ji x_i, the sums of BLOCK neurons in registers; then ReLU, which keeps NaN.
// The weight w_ji is at weight[j * ROW + i * COLUMN]. The last block overlaps with the one before.
template <int IN, int OUT, int ROW, int COLUMN, bool relu>
INLINE void dense(const Scalar* weights, const Scalar* biases, const Plane* x, Plane* __restrict outputs) {
    constexpr int COUNT = OUT < BLOCK ? OUT : BLOCK;
    for (int next = 0; next < OUT; next += COUNT) {
        const int first = next < OUT - COUNT ? next : OUT - COUNT;
        const Scalar *weight = weights + first * ROW, *bias = biases ? biases + first : nullptr;
        Plane* __restrict y = outputs + first;
        Vector sum[COUNT][STRIP];
        for (int j = 0; j < COUNT; ++j)
            for (int s = 0; s < STRIP; ++s) sum[j][s] = Vector{} + (bias ? Real(bias[j]) : 0);
        for (int i = 0; i < IN; ++i)
            for (int j = 0; j < COUNT; ++j)
                for (int s = 0; s < STRIP; ++s) sum[j][s] += Real(weight[j * ROW + i * COLUMN]) * x[i][s];
        for (int j = 0; j < COUNT; ++j)
            for (int s = 0; s < STRIP; ++s) y[j][s] = relu ? (sum[j][s] < 0 ? Vector{} : sum[j][s]) : sum[j][s];
    }
}

// e^x for x up to 0: 2^n e^r with x = n log 2 + r, and the Taylor series of e^r, |r| <= log(2) / 2,
// to the term that no longer matters. 2^n in two factors, since it may be no normal number.
INLINE Vector exponential(Vector x) {
    constexpr int TERMS = SINGLE ? 8 : 14, MANTISSA = SINGLE ? 23 : 52, BIAS = SINGLE ? 127 : 1023;
    constexpr Real LOWEST = SINGLE ? -104 : -746;  // e^LOWEST rounds to 0
    constexpr Real HIGH = SINGLE ? 0x1.62e4p-1 : 0x1.62e42feep-1;  // few bits, so that n HIGH is exact
    constexpr Real LOW = 0x1.62e42fefa39ef35793c7673007e6p-1L - (long double)HIGH;
    constexpr Real ROUND = SINGLE ? 0x1.8p23 : 0x1.8p52;  // added, it leaves a whole number in the last bits
    x = x < LOWEST ? Vector{} + LOWEST : x;
    Vector rounded = x * Real(1.44269504088896340736L) + ROUND, n = rounded - ROUND;
    Vector r = x - n * HIGH - n * LOW, power = Vector{} + 1;
    for (int k = TERMS - 1; k > 0; --k) power = power * (r * Real(1.0L / k)) + 1;
    Wholes whole = (Wholes)rounded - (Wholes)(Vector{} + ROUND), half = whole >> 1;
    return power * (Vector)((half + BIAS) << MANTISSA) * (Vector)((whole - half + BIAS) << MANTISSA);
}

// Probabilities, and for the loss the largest logit and the sum of the exponentials.
INLINE void softmax(const Plane* logits, Plane* __restrict p, Plane& top, Plane& sum) {
    for (int s = 0; s < STRIP; ++s) {
        top[s] = logits[0][s], sum[s] = Vector{};
        for (int j = 1; j < OUTPUTS; ++j) top[s] = logits[j][s] > top[s] ? logits[j][s] : top[s];
        for (int j = 0; j < OUTPUTS; ++j) sum[s] += p[j][s] = exponential(logits[j][s] - top[s]);
        for (int j = 0; j < OUTPUTS; ++j) p[j][s] /= sum[s];
    }
}

// A whole tile is the usual case, and faster where its size is known.
template <class Use> INLINE void each(int count, Use use) {
    if (count == TILE)
        for (int s = 0; s < TILE; ++s) use(s);
    else
        for (int s = 0; s < count; ++s) use(s);
}

// The filling of a tile must add nothing, not even 0 times infinity.
INLINE void clear(Plane* planes, int width, int count) {
    for (int j = 0; j < width; ++j)
        for (int s = count; s < TILE; ++s) ((Real*)planes[j])[s] = 0;
}

// COUNT features of `count` samples to planes; and back.
template <int COUNT> INLINE void spread(const Scalar* rows, Plane* __restrict planes, int count) {
    each(count, [=](int s) {
        for (int i = 0; i < COUNT; ++i) ((Real*)planes[i])[s] = rows[s * COUNT + i];
    });
    clear(planes, COUNT, count);
}
template <int COUNT> INLINE void gather(const Plane* planes, Scalar* __restrict rows, int count) {
    each(count, [=](int s) {
        for (int j = 0; j < COUNT; ++j) rows[s * COUNT + j] = ((const Real*)planes[j])[s];
    });
}

// The end of the chain: the output, and the gradient of the logits, from that of the output or of the loss.
template <bool BACK> INLINE void end(const Call& call, Workspace& work, int64_t n, int count) {
    const Plane* logits = work.inputs + ALL.planes;
    Plane *grad = work.grads[LAYERS % 2], *p = work.grads[(LAYERS + 1) % 2], top, sum;
    if (SOFTMAX || call.target) softmax(logits, p, top, sum);
    if (!BACK) return gather<OUTPUTS>(SOFTMAX ? p : logits, call.output + n * OUTPUTS, count);
    if (call.output_grad) {
        spread<OUTPUTS>(call.output_grad + n * OUTPUTS, grad, count);
        for (int s = 0; SOFTMAX && s < STRIP; ++s) {
            Vector total{};
            for (int j = 0; j < OUTPUTS; ++j) total += grad[j][s] * p[j][s];
            for (int j = 0; j < OUTPUTS; ++j) grad[j][s] = p[j][s] * (grad[j][s] - total);
        }
    }
    if (call.target) {
        const Real scale = Real(1) / call.samples;
        double product = 1;  // its logarithm is the sum of theirs, and OUTPUTS^TILE no infinity
        for (int j = 0; j < OUTPUTS; ++j)
            for (int s = 0; s < STRIP; ++s) grad[j][s] = p[j][s] * scale;
        for (int s = 0; s < count; ++s) {
            const uint64_t own = call.target[n + s];
            if (own >= OUTPUTS) {
                work.valid = false;
                continue;
            }
            ((Real*)grad[own])[s] = (((Real*)p[own])[s] - 1) * scale;
            work.loss += ((Real*)top)[s] - ((const Real*)logits[own])[s];
            product *= ((Real*)sum)[s];
        }
        work.loss += __builtin_log(product);
    }
}

// The layers from number L on, forward, and on the way back, if it is wanted, the chain rule.
template <int L, bool BACK> INLINE void layers(const Call& call, Workspace& work, int64_t n, int count) {
    if constexpr (L == LAYERS) {
        end<BACK>(call, work, n, count);
    } else {
        constexpr int IN = WIDTH[L], OUT = WIDTH[L + 1];
        constexpr Sizes START = before(L);
        const Scalar *weight = call.parameters[START.tensors], *bias = BIAS[L] ? call.parameters[START.tensors + 1] : nullptr;
        Plane *x = work.inputs + START.planes, *y = x + IN, *grad = work.grads[(L + 1) % 2];
        dense<IN, OUT, IN, 1, RELU[L]>(weight, bias, x, y);
        layers<L + 1, BACK>(call, work, n, count);
        if (!BACK || !work.backward) return;
        Vector *weights = work.sums + START.numbers, *biases = weights + OUT * IN;
        clear(grad, OUT, count), clear(x, IN, count);
        for (int j = 0; j < OUT; ++j) {
            for (int s = 0; s < STRIP; ++s) {
                if (RELU[L]) grad[j][s] = y[j][s] <= 0 ? Vector{} : grad[j][s];
                if (BIAS[L]) biases[j] += grad[j][s];
            }
            for (int i = 0; i < IN; ++i)
                for (int s = 0; s < STRIP; ++s) weights[j * IN + i] += grad[j][s] * x[i][s];
        }
        if (L > 0 || call.input_grad) dense<OUT, IN, 1, IN, false>(weight, nullptr, grad, work.grads[L % 2]);
    }
}

template <bool BACK> INLINE void tile(const Call& call, Workspace& work, int64_t n, int count) {
    spread<INPUTS>(call.input + n * INPUTS, work.inputs, count);
    layers<0, BACK>(call, work, n, count);
    if (BACK && call.input_grad) gather<INPUTS>(work.grads[0], call.input_grad + n * INPUTS, count);
}

// Sums over samples are made in CHUNKS parts, whatever the number of threads, and these are added in
// their order, so that the same input always gives the same result.
constexpr int64_t CHUNK = 512, CHUNKS = 64;

// 0 if it is done; 1 if nothing was, as the output overlaps with what is read; 2 for a target that is
// no class, or too little memory.
extern "C" int run(const Call& call) {
    const int64_t samples = call.samples, tiles = (samples + TILE - 1) / TILE, most = samples / CHUNK;
    const Scalar *output = call.output, *output_end = output + (output ? samples * OUTPUTS : 0);
    bool backward = call.input_grad, overlaps = call.input < output_end && output < call.input + samples * INPUTS;
    for (int l = 0, t = 0; l < LAYERS; ++l)
        for (int kind = 0; kind <= BIAS[l]; ++kind, ++t) {
            const Scalar *start = call.parameters[t], *end = start + WIDTH[l + 1] * (kind ? 1 : WIDTH[l]);
            overlaps |= start < output_end && output < end;
            backward |= call.grads[t] != nullptr;
        }
    if (output && overlaps) return 1;
#ifdef MADV_HUGEPAGE
    // A fresh output gets its memory page by page when it is written; large pages are fewer.
    const uintptr_t page = 1 << 21, last = uintptr_t(output_end) & -page, first = (uintptr_t(output) + page - 1) & -page;
    if (output && first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
    // Little work is not worth waking another thread for.
    const int threads = (backward ? 3 : 1) * samples * ALL.products < 1 << 18 ? 1 : call.threads;
    const int64_t chunks = output ? threads : most < 1 ? 1 : most > CHUNKS ? CHUNKS : most;
    auto* sums = backward ? (Real*)malloc(chunks * ALL.numbers * sizeof(Real)) : nullptr;
    if (backward && !sums) return 2;
    double losses[CHUNKS];
    const auto part = [&](int64_t first, int64_t last) {
        auto* work = (Workspace*)aligned_alloc(BYTES, sizeof(Workspace));
        if (!work) return false;
        work->backward = backward, work->valid = true;
        for (int64_t c = first; c < last; ++c) {
            if (backward) memset((void*)work->sums, 0, sizeof(work->sums));
            work->loss = 0;
            for (int64_t n = tiles * c / chunks * TILE; n < tiles * (c + 1) / chunks * TILE; n += TILE) {
                const int count = samples - n < TILE ? samples - n : TILE;
                output ? tile<false>(call, *work, n, count) : tile<true>(call, *work, n, count);
            }
            if (!output) losses[c] = work->loss;
            for (int p = 0; backward && p < ALL.numbers; ++p) {
                Real total = 0;
                for (Real lane : (Real(&)[BYTES / sizeof(Real)])work->sums[p]) total += lane;
                sums[c * ALL.numbers + p] = total;
            }
        }
        const bool valid = work->valid;
        free(work);
        return valid;
    };
    bool valid = true;
    if (threads == 1) {
        valid = part(0, chunks);
    } else {
#pragma omp parallel for num_threads(threads) reduction(&& : valid)
        for (int t = 0; t < threads; ++t) valid = part(chunks * t / threads, chunks * (t + 1) / threads) && valid;
    }
    double loss = 0;
    for (int64_t c = 0; !output && valid && c < chunks; ++c) loss += losses[c];
    if (call.loss) *call.loss = Real(loss / samples);
    for (int l = 0, t = 0, p = 0; backward && valid && l < LAYERS; ++l)
        for (int kind = 0; kind <= BIAS[l]; ++kind, ++t)
            for (int k = 0; k < WIDTH[l + 1] * (kind ? 1 : WIDTH[l]); ++k, ++p) {
                double total = 0;
                for (int64_t c = 0; c < chunks; ++c) total += sums[c * ALL.numbers + p];
                if (call.grads[t]) call.grads[t][k] = Real(total);
            }
    free(sums);
    return valid ? 0 : 2;
}
