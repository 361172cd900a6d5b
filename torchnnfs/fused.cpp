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

struct bfloat16 { uint16_t bits; };
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
constexpr int widest() {
    int most = 0;
    for (int width : WIDTH) most = width > most ? width : most;
    return most;
}
constexpr int plane(int layer) {  // the first plane of a layer's inputs, where all are kept
    int count = 0;
    for (int l = 0; l < layer; ++l) count += WIDTH[l];
    return count;
}
constexpr int parameter(int layer) {  // the first weight of a layer; its biases follow its weights
    int count = 0;
    for (int l = 0; l < layer; ++l) count += WIDTH[l + 1] * (WIDTH[l] + 1);
    return count;
}
constexpr int PARAMETERS = parameter(LAYERS);

#define INLINE static inline __attribute__((always_inline))

template <class T> INLINE Real load(T x) { return x; }
INLINE Real load(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
template <class T> INLINE void store(T& place, Real x) { place = x; }
INLINE void store(bfloat16& place, Real x) {  // to the nearest, ties to even; NaN stays NaN
    float value = x;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    place.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// y_j = b_j + sum_i w_ji x_i for COUNT neurons, all sums in registers; then ReLU, which keeps NaN.
// The weight w_ji is at weight[j * ROW + i * COLUMN].
template <int IN, int COUNT, int ROW, int COLUMN, bool relu>
INLINE void neurons(const Scalar* weight, const Scalar* bias, const Plane* x, Plane* y) {
    Vector sum[COUNT][STRIP];
    for (int j = 0; j < COUNT; ++j)
        for (int s = 0; s < STRIP; ++s) sum[j][s] = Vector{} + (bias ? load(bias[j]) : 0);
    for (int i = 0; i < IN; ++i)
        for (int j = 0; j < COUNT; ++j)
            for (int s = 0; s < STRIP; ++s) sum[j][s] += load(weight[j * ROW + i * COLUMN]) * x[i][s];
    for (int j = 0; j < COUNT; ++j)
        for (int s = 0; s < STRIP; ++s) y[j][s] = relu ? (sum[j][s] < 0 ? Vector{} : sum[j][s]) : sum[j][s];
}

template <int IN, int OUT, int ROW, int COLUMN, bool relu>
INLINE void dense(const Scalar* weight, const Scalar* bias, const Plane* x, Plane* y) {
    constexpr int REST = OUT % BLOCK, WHOLE = OUT - REST;
    for (int j = 0; j < WHOLE; j += BLOCK)
        neurons<IN, BLOCK, ROW, COLUMN, relu>(weight + j * ROW, bias ? bias + j : bias, x, y + j);
    if constexpr (REST > 0)
        neurons<IN, REST, ROW, COLUMN, relu>(weight + WHOLE * ROW, bias ? bias + WHOLE : bias, x, y + WHOLE);
}

// The layers from number L on, each from one buffer to the other; where the last one's output is.
template <int L> INLINE Plane* layers(const Scalar* const* parameters, Plane* x, Plane* y) {
    if constexpr (L == LAYERS) {
        return x;
    } else {
        constexpr int IN = WIDTH[L], OUT = WIDTH[L + 1];
        dense<IN, OUT, IN, 1, RELU[L]>(parameters[2 * L], parameters[2 * L + 1], x, y);
        return layers<L + 1>(parameters, y, x);
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

// log(x) for x from 1 on: n log 2 + log m with x = 2^n m, and log m = 2 atanh(t), t = (m - 1) / (m + 1).
INLINE Vector logarithm(Vector x) {
    constexpr int TERMS = SINGLE ? 6 : 13, MANTISSA = SINGLE ? 23 : 52;
    constexpr Whole ONE = (Whole)(SINGLE ? 127 : 1023) << MANTISSA, ROOT = SINGLE ? 0x3fb504f3 : 0x3ff6a09e667f3bcd;
    Wholes bits = (Wholes)x, n = (bits - ROOT + ONE) >> MANTISSA;
    n -= SINGLE ? 127 : 1023;
    Vector m = (Vector)(bits - (n << MANTISSA)), t = (m - 1) / (m + 1), square = t * t, series{};
    for (int k = TERMS - 1; k >= 0; --k) series = series * square + Real(2.0L / (2 * k + 1));
    return __builtin_convertvector(n, Vector) * Real(0.693147180559945309417L) + t * series + (x - x);  // NaN stays
}

INLINE void softmax(Plane* y) {
    for (int s = 0; s < STRIP; ++s) {
        Vector top = y[0][s], sum{};
        for (int j = 1; j < OUTPUTS; ++j) top = y[j][s] > top ? y[j][s] : top;
        for (int j = 0; j < OUTPUTS; ++j) sum += y[j][s] = exponential(y[j][s] - top);
        for (int j = 0; j < OUTPUTS; ++j) y[j][s] /= sum;
    }
}

// COUNT features of `count` samples to planes, the rest of the tile filled up with zeros; and back.
template <int COUNT> INLINE void spread(const Scalar* rows, Plane* planes, int count) {
    for (int s = 0; s < TILE; ++s)
        for (int i = 0; i < COUNT; ++i) ((Real*)planes[i])[s] = s < count ? load(rows[s * COUNT + i]) : 0;
}
template <int COUNT> INLINE void gather(const Plane* planes, Scalar* rows, int count) {
    for (int s = 0; s < count; ++s)
        for (int j = 0; j < COUNT; ++j) store(rows[s * COUNT + j], ((const Real*)planes[j])[s]);
}

INLINE void tile(const Scalar* const* parameters, const Scalar* input, Scalar* output, int count) {
    Plane here[widest()], there[widest()];
    spread<INPUTS>(input, here, count);
    Plane* y = layers<0>(parameters, here, there);
    if (SOFTMAX) softmax(y);
    gather<OUTPUTS>(y, output, count);
}

// What one thread needs for the backward pass: the inputs of all layers, two gradients of a layer's
// output, and a sum for each parameter, in as many parts as a register has lanes.
struct alignas(BYTES) Workspace {
    Plane inputs[plane(LAYERS + 1)], here[widest()], there[widest()];
    Vector sums[PARAMETERS];
};

template <int L> INLINE void ahead(const Scalar* const* parameters, Plane* inputs) {
    constexpr int IN = WIDTH[L], OUT = WIDTH[L + 1];
    dense<IN, OUT, IN, 1, RELU[L]>(parameters[2 * L], parameters[2 * L + 1], inputs + plane(L), inputs + plane(L + 1));
    if constexpr (L + 1 < LAYERS) ahead<L + 1>(parameters, inputs);
}

// The filling of a tile must add nothing, not even 0 times infinity.
INLINE void clear(Plane* planes, int width, int count) {
    for (int j = 0; j < width; ++j)
        for (int s = count; s < TILE; ++s) ((Real*)planes[j])[s] = 0;
}

// The chain rule from layer L down: `grad` is that of its output; where that of the input is.
template <int L>
INLINE Plane* back(const Scalar* const* parameters, Workspace& work, Plane* grad, Plane* next, int count, bool all) {
    constexpr int IN = WIDTH[L], OUT = WIDTH[L + 1];
    Plane *x = work.inputs + plane(L), *y = work.inputs + plane(L + 1);
    Vector *weights = work.sums + parameter(L), *biases = weights + OUT * IN;
    if (count < TILE) clear(grad, OUT, count), clear(x, IN, count);
    for (int j = 0; j < OUT; ++j) {
        for (int s = 0; s < STRIP; ++s) {
            if (RELU[L]) grad[j][s] = y[j][s] <= 0 ? Vector{} : grad[j][s];
            biases[j] += grad[j][s];
        }
        for (int i = 0; i < IN; ++i)
            for (int s = 0; s < STRIP; ++s) weights[j * IN + i] += grad[j][s] * x[i][s];
    }
    if (L > 0 || all) dense<OUT, IN, 1, IN, false>(parameters[2 * L], nullptr, grad, next);
    if constexpr (L > 0)
        return back<L - 1>(parameters, work, next, grad, count, all);
    else
        return next;
}

// The gradient of softmax's input, from that of its output.
INLINE void softmax_back(const Plane* logits, Plane* grad, Plane* p) {
    memcpy((void*)p, logits, OUTPUTS * sizeof(Plane));
    softmax(p);
    for (int s = 0; s < STRIP; ++s) {
        Vector total{};
        for (int j = 0; j < OUTPUTS; ++j) total += grad[j][s] * p[j][s];
        for (int j = 0; j < OUTPUTS; ++j) grad[j][s] = p[j][s] * (grad[j][s] - total);
    }
}

// The cross-entropy of `count` samples, all together, and its gradient times `scale`; `valid` tells
// whether the targets are classes.
INLINE double cross_entropy(const Plane* logits, const int64_t* target, int count, Real scale, Plane* grad, bool& valid) {
    Wholes classes[STRIP];
    Plane loss;
    for (int s = 0; s < TILE; ++s) {
        if (s < count) valid = valid && uint64_t(target[s]) < OUTPUTS;
        ((Whole*)classes)[s] = s < count ? target[s] : 0;
    }
    for (int s = 0; s < STRIP; ++s) {
        Vector top = logits[0][s], sum{}, own{};
        for (int j = 1; j < OUTPUTS; ++j) top = logits[j][s] > top ? logits[j][s] : top;
        for (int j = 0; j < OUTPUTS; ++j) sum += grad[j][s] = exponential(logits[j][s] - top);
        for (int j = 0; j < OUTPUTS; ++j) {
            own = classes[s] == j ? logits[j][s] : own;
            grad[j][s] = (grad[j][s] / sum - (classes[s] == j ? Vector{} + 1 : Vector{})) * scale;
        }
        loss[s] = logarithm(sum) + (top - own);
    }
    double total = 0;
    for (int s = 0; s < count; ++s) total += ((Real*)loss)[s];
    return total;
}

// Products a sample; an exponential is like 16.
constexpr int64_t cost() {
    int64_t total = SOFTMAX * 16 * OUTPUTS;
    for (int l = 0; l < LAYERS; ++l) total += int64_t(WIDTH[l]) * WIDTH[l + 1];
    return total;
}
// Little work is not worth waking another thread for.
static int threads_for(int64_t products, int threads) { return products < 1 << 18 ? 1 : threads; }

static void compute(const Scalar* const* parameters, const Scalar* input, Scalar* output,
                    int64_t samples, int threads) {
#ifdef MADV_HUGEPAGE
    // A fresh output gets its memory page by page when it is written; large pages are fewer.
    const uintptr_t page = 1 << 21, end = uintptr_t(output + samples * OUTPUTS) & -page,
                    start = (uintptr_t(output) + page - 1) & -page;
    if (start < end) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
    const int64_t whole = samples / TILE * TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < whole; n += TILE) tile(parameters, input + n * INPUTS, output + n * OUTPUTS, TILE);
    if (whole < samples) tile(parameters, input + whole * INPUTS, output + whole * OUTPUTS, samples - whole);
}

enum Outcome { DONE, DECLINED };

// The functions get their arguments as one list of numbers and addresses; 0 is for what there is not.
// a = samples, threads, input, output, then weight and bias of each layer.
extern "C" int forward(const int64_t* a) {
    const auto* parameters = (const Scalar* const*)(a + 4);
    const auto *x = (const Scalar*)a[2], *x_end = x + a[0] * INPUTS;
    auto *y = (Scalar*)a[3], *y_end = y + a[0] * OUTPUTS;
    if (x < y_end && y < x_end) return DECLINED;
    for (int p = 0; p < 2 * LAYERS; ++p) {
        const int64_t count = int64_t(WIDTH[p / 2 + 1]) * (p % 2 ? 1 : WIDTH[p / 2]);
        if (parameters[p] && parameters[p] < y_end && y < parameters[p] + count) return DECLINED;
    }
    compute(parameters, x, y, a[0], threads_for(a[0] * cost(), a[1]));
    return DONE;
}

// Sums over samples are made in CHUNKS parts, whatever the number of threads, and these are added in
// their order, so that the same input always gives the same result.
constexpr int64_t CHUNK = 512, CHUNKS = 64;

// a = samples, threads, input, gradient of the output, target, gradient of the input, loss, then
// weight and bias of each layer, then their gradients. With a target, the loss is what is derived.
extern "C" int gradients(const int64_t* a) {
    const int64_t samples = a[0], tiles = (samples + TILE - 1) / TILE, most = samples / CHUNK;
    const int64_t chunks = most < 1 ? 1 : most > CHUNKS ? CHUNKS : most;
    const auto* input = (const Scalar*)a[2];
    const auto* grad_output = (const Scalar*)a[3];
    const auto* target = (const int64_t*)a[4];
    auto* grad_input = (Scalar*)a[5];
    auto* parameters = (const Scalar* const*)(a + 7);
    auto* wanted = (Scalar* const*)(a + 7 + 2 * LAYERS);
    bool backward = grad_input;
    for (int p = 0; p < 2 * LAYERS; ++p) backward = backward || wanted[p];
    const Real scale = Real(1) / samples;
    const int threads = threads_for(3 * samples * cost(), a[1]);
    auto* sums = (Real*)malloc(chunks * PARAMETERS * sizeof(Real));
    double losses[CHUNKS] = {};
    bool valid = true, memory = sums;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : valid, memory)
    {
        auto* work = (Workspace*)aligned_alloc(BYTES, sizeof(Workspace));
        memory = sums && work;
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            if (!memory) continue;
            memset((void*)work->sums, 0, sizeof(work->sums));
            for (int64_t n = tiles * c / chunks * TILE; n < tiles * (c + 1) / chunks * TILE; n += TILE) {
                const int count = samples - n < TILE ? samples - n : TILE;
                const Plane* logits = work->inputs + plane(LAYERS);
                spread<INPUTS>(input + n * INPUTS, work->inputs, count);
                ahead<0>(parameters, work->inputs);
                if (target) {
                    losses[c] += cross_entropy(logits, target + n, count, scale, work->here, valid);
                    if (!backward) continue;
                } else {
                    spread<OUTPUTS>(grad_output + n * OUTPUTS, work->here, count);
                    if (SOFTMAX) softmax_back(logits, work->here, work->there);
                }
                Plane* g = back<LAYERS - 1>(parameters, *work, work->here, work->there, count, grad_input);
                if (grad_input) gather<INPUTS>(g, grad_input + n * INPUTS, count);
            }
            for (int p = 0; p < PARAMETERS; ++p) {
                Real total = 0;
                for (Real part : (Real(&)[BYTES / sizeof(Real)])work->sums[p]) total += part;
                sums[c * PARAMETERS + p] = total;
            }
        }
        free(work);
    }
    double loss = 0;
    for (double each : losses) loss += each;
    if (target) store(*(Scalar*)a[6], loss / samples);
    for (int l = 0, p = 0; backward && memory && l < LAYERS; ++l)
        for (int kind = 0; kind < 2; ++kind)
            for (int k = 0; k < WIDTH[l + 1] * (kind ? 1 : WIDTH[l]); ++k, ++p) {
                double total = 0;
                for (int64_t c = 0; c < chunks; ++c) total += sums[c * PARAMETERS + p];
                if (wanted[2 * l + kind]) store(wanted[2 * l + kind][k], total);
            }
    free(sums);
    return memory && valid ? DONE : DECLINED;
}
