// The forward pass of a chain of dense layers, a tile of samples at a time.
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
// through memory; the planes of a tile stay in the first level of the cache.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <ATen/dlpack.h>
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
template <int IN, int COUNT, bool relu>
INLINE void neurons(const Scalar* weight, const Scalar* bias, const Plane* x, Plane* y) {
    Vector sum[COUNT][STRIP];
    for (int j = 0; j < COUNT; ++j)
        for (int s = 0; s < STRIP; ++s) sum[j][s] = Vector{} + (bias ? load(bias[j]) : 0);
    for (int i = 0; i < IN; ++i)
        for (int j = 0; j < COUNT; ++j)
            for (int s = 0; s < STRIP; ++s) sum[j][s] += load(weight[j * IN + i]) * x[i][s];
    for (int j = 0; j < COUNT; ++j)
        for (int s = 0; s < STRIP; ++s) y[j][s] = relu ? (sum[j][s] < 0 ? Vector{} : sum[j][s]) : sum[j][s];
}

// The layers from number L on, each from one buffer to the other; where the last one's output is.
template <int L> INLINE Plane* layers(const Scalar* const* parameters, Plane* x, Plane* y) {
    if constexpr (L == LAYERS) {
        return x;
    } else {
        constexpr int IN = WIDTH[L], OUT = WIDTH[L + 1], REST = OUT % BLOCK, WHOLE = OUT - REST;
        const Scalar *weight = parameters[0], *bias = parameters[1];
        for (int j = 0; j < WHOLE; j += BLOCK)
            neurons<IN, BLOCK, RELU[L]>(weight + j * IN, bias ? bias + j : bias, x, y + j);
        if constexpr (REST > 0)
            neurons<IN, REST, RELU[L]>(weight + WHOLE * IN, bias ? bias + WHOLE : bias, x, y + WHOLE);
        return layers<L + 1>(parameters + 2, y, x);
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

INLINE void softmax(Plane* y) {
    for (int s = 0; s < STRIP; ++s) {
        Vector top = y[0][s], sum{};
        for (int j = 1; j < OUTPUTS; ++j) top = y[j][s] > top ? y[j][s] : top;
        for (int j = 0; j < OUTPUTS; ++j) sum += y[j][s] = exponential(y[j][s] - top);
        for (int j = 0; j < OUTPUTS; ++j) y[j][s] /= sum;
    }
}

INLINE void tile(const Scalar* const* parameters, const Scalar* input, Scalar* output) {
    Plane here[widest()], there[widest()];
    for (int s = 0; s < TILE; ++s)
        for (int i = 0; i < INPUTS; ++i) ((Real*)here[i])[s] = load(input[s * INPUTS + i]);
    Plane* y = layers<0>(parameters, here, there);
    if (SOFTMAX) softmax(y);
    for (int s = 0; s < TILE; ++s)
        for (int j = 0; j < OUTPUTS; ++j) store(output[s * OUTPUTS + j], ((Real*)y[j])[s]);
}

static void compute(const Scalar* const* parameters, const Scalar* input, Scalar* output,
                    int64_t samples, int threads) {
#ifdef MADV_HUGEPAGE
    // A fresh output gets its memory page by page when it is written; large pages are fewer.
    const uintptr_t page = 1 << 21, end = uintptr_t(output + samples * OUTPUTS) & -page,
                    start = (uintptr_t(output) + page - 1) & -page;
    if (start < end) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
    const int64_t tiles = samples / TILE, rest = samples % TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tiles; ++t)
        tile(parameters, input + t * TILE * INPUTS, output + t * TILE * OUTPUTS);
    if (rest) {  // a tile of its own, filled up with zeros
        Scalar in[TILE * INPUTS] = {}, out[TILE * OUTPUTS];
        memcpy(in, input + tiles * TILE * INPUTS, rest * INPUTS * sizeof(Scalar));
        tile(parameters, in, out);
        memcpy(output + tiles * TILE * OUTPUTS, out, rest * OUTPUTS * sizeof(Scalar));
    }
}

// The rest makes a Python function of it. Tensors are looked at through the table of functions that
// torch offers for it (DLPack's exchange API), and no header of Python's need be installed.

using Object = void;
struct Method { const char* name; void* function; int flags; const char* doc; };
extern "C" {
Object* PyCFunction_NewEx(Method*, Object*, Object*);
Object* PyDict_GetItem(Object*, Object*);
Object* PyTuple_GetItem(Object*, intptr_t);
Object* PyUnicode_InternFromString(const char*);
Object* PyObject_Type(Object*);
Object* PyLong_FromLong(long);
long PyLong_AsLong(Object*);
void Py_IncRef(Object*);
void Py_DecRef(Object*);
void PyErr_Clear();
Object* PyEval_SaveThread();
void PyEval_RestoreThread(Object*);
}

static const DLPackExchangeAPI* api;
static Object *tensor_type, *parameter_type, *none, *names[2];

static int64_t size(const DLTensor& tensor) {
    int64_t count = 1;
    for (int d = 0; d < tensor.ndim; ++d) count *= tensor.shape[d];
    return count;
}

// What a tensor is, if it is a plain one on the CPU and of our type; no subclass, no wrapper.
static bool look(Object* object, DLTensor& tensor) {
    Object* type = PyObject_Type(object);
    Py_DecRef(type);  // the object keeps it
    if (type != tensor_type && type != parameter_type) return false;
    if (api->dltensor_from_py_object_no_sync(object, &tensor)) return PyErr_Clear(), false;
    constexpr int code = std::is_same_v<Scalar, bfloat16> ? kDLBfloat : kDLFloat;
    if (!tensor.data && size(tensor)) return false;  // its memory was given back
    return tensor.device.device_type == kDLCPU && tensor.dtype.code == code &&
           tensor.dtype.bits == 8 * sizeof(Scalar) && tensor.dtype.lanes == 1;
}

static Scalar* data(const DLTensor& tensor) { return (Scalar*)((char*)tensor.data + tensor.byte_offset); }

static bool contiguous(const DLTensor& tensor) {
    int64_t stride = 1;
    for (int d = tensor.ndim; d-- > 0; stride *= tensor.shape[d])
        if (tensor.shape[d] != 1 && tensor.strides[d] != stride) return false;
    return true;
}

enum Outcome { DONE, DECLINED, STRIDED, CHANGED };

// forward(input, output, threads, parameters), the last a tuple of the layers' `_parameters`: DONE;
// DECLINED, if the layers must do it; STRIDED, if input must be made contiguous; CHANGED, if
// the parameters are others than this was compiled for.
static Outcome forward(Object* const* arguments) {
    int64_t cost = SOFTMAX * 16 * OUTPUTS;  // products a sample; an exponential is like 16
    const Scalar* parameters[2 * LAYERS];
    Object* owners[2 * LAYERS];
    for (int layer = 0; layer < LAYERS; ++layer) {
        Object* held = PyTuple_GetItem(arguments[3], layer);
        Object *weight = PyDict_GetItem(held, names[0]), *bias = PyDict_GetItem(held, names[1]);
        DLTensor w, b;
        if (!weight || !look(weight, w) || w.ndim != 2 || !contiguous(w)) return CHANGED;
        if (w.shape[0] != WIDTH[layer + 1] || w.shape[1] != WIDTH[layer]) return CHANGED;
        if ((bias != none) != BIAS[layer]) return CHANGED;
        if (BIAS[layer] && (!bias || !look(bias, b) || b.ndim != 1 || !contiguous(b))) return CHANGED;
        if (BIAS[layer] && b.shape[0] != WIDTH[layer + 1]) return CHANGED;
        parameters[2 * layer] = data(w), parameters[2 * layer + 1] = BIAS[layer] ? data(b) : nullptr;
        owners[2 * layer] = weight, owners[2 * layer + 1] = bias;
        cost += int64_t(WIDTH[layer]) * WIDTH[layer + 1];
    }
    DLTensor input, output;
    if (!look(arguments[0], input) || !look(arguments[1], output)) return DECLINED;
    if (!input.ndim || input.ndim != output.ndim || !contiguous(output)) return DECLINED;
    for (int d = 0; d < input.ndim - 1; ++d)
        if (input.shape[d] != output.shape[d]) return DECLINED;
    if (input.shape[input.ndim - 1] != INPUTS || output.shape[input.ndim - 1] != OUTPUTS) return DECLINED;
    if (!contiguous(input)) return STRIDED;
    const Scalar *x = data(input), *x_end = x + size(input);
    Scalar *y = data(output), *y_end = y + size(output);
    if (x < y_end && y < x_end) return DECLINED;  // they overlap
    for (int p = 0; p < 2 * LAYERS; ++p) {  // so do output and a parameter
        const int64_t count = int64_t(WIDTH[p / 2 + 1]) * (p % 2 ? 1 : WIDTH[p / 2]);
        if (parameters[p] && parameters[p] < y_end && y < parameters[p] + count) return DECLINED;
    }
    const int64_t samples = (x_end - x) / INPUTS;
    if (samples * cost < 1 << 18) {  // too little to wake another thread for
        compute(parameters, x, y, samples, 1);
    } else {
        for (Object* each : owners) Py_IncRef(each);  // others may replace them meanwhile
        const int threads = PyLong_AsLong(arguments[2]);
        Object* state = PyEval_SaveThread();
        compute(parameters, x, y, samples, threads);
        PyEval_RestoreThread(state);
        for (Object* each : owners) Py_DecRef(each);
    }
    return DONE;
}

static Object* call(Object*, Object* const* arguments, intptr_t count) {
    return PyLong_FromLong(count == 4 ? forward(arguments) : DECLINED);
}

extern "C" Object* load(const DLPackExchangeAPI* exchange, Object* tensor, Object* parameter,
                        Object* nothing) {
    api = exchange, tensor_type = tensor, parameter_type = parameter, none = nothing;
    names[0] = PyUnicode_InternFromString("weight"), names[1] = PyUnicode_InternFromString("bias");
    static Method method = {"forward", (void*)call, 0x80 /* METH_FASTCALL */, nullptr};
    return PyCFunction_NewEx(&method, nullptr, nullptr);
}
