// Expert FFNs over rows sorted by expert, fused: y = act(x W1^T + b1) W2^T + b2, or act(x Wg^T) * (x W1^T + b1) where
// there is a gate, for all experts of a call at once. A plain C interface, so that neither Python's nor torch's headers
// are needed and one build serves every release of both.
//
// Work is a list of items (an expert, a phase, a range of outputs or rows), claimed in order by whichever thread is free.
// Threads are those of the OpenMP runtime that torch has loaded, so that none compete with torch's own.
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define MOE_X86 1
#endif

namespace {

constexpr int CHUNK = 64;          // rows of one pass over a panel
constexpr int PANEL_STRIDE = 48;   // outputs of a panel, at most: a multiple of every tile's
constexpr int DIGITS = 3;          // bytes of a fixed-point number, at most
constexpr int DIGIT_ROWS = 32;     // rows of one pass, as fixed-point numbers
constexpr int SUM_ROWS = DIGITS * DIGIT_ROWS > CHUNK ? DIGITS * DIGIT_ROWS : CHUNK;
constexpr double EVEN_RATIO = 24;  // see two_bytes_do() in epilogue.inc

constexpr int64_t LINE = 64;       // bytes of a cache's line

// How far ahead weights are fetched, at least, and how many bytes of them an item has, where there are enough to share
// out. 4 to 32 KiB ahead measured alike; items of 256 KiB were up to a tenth faster than ones of 64 KiB.
constexpr int64_t AHEAD_BYTES = 8 << 10, ITEM_BYTES = 256 << 10;

// Of transposed matrices: outputs that are computed together, and elements of K before the next block of them.
constexpr int64_t COLUMNS = 192, DEPTH_OF_BLOCK = 32;

// Of one row of weights that meets many rows before the next part does. A fourth of it, which would let all stay in the
// first-level cache, measured up to a tenth slower: sums are put away and taken up more often.
constexpr int64_t BLOCK_BYTES = 8 << 10;

enum Phase { ROWS, FIRST, HIDDEN, SECOND, PHASES };  // convert rows; fc1 and the gate; convert the hidden layer; fc2
enum Activation { RELU = 0, GELU = 1, SILU = 2, CLAMPED_SWIGLU = 3 };
enum DType { F32 = 0, BF16 = 1, I8 = 2 };
enum Level { GENERIC = 0, AVX2 = 1, AVX512 = 2, AVX512_VNNI = 3, AVX512_BF16 = 4 };

struct Expert {  // as the caller lays it out: 17 numbers of 8 bytes. Without fc2 it is a linear layer, x W1^T + b1
    const void *fc1, *gate, *fc2;
    const float *fc1_scale, *gate_scale, *fc2_scale;
    const void *fc1_bias, *gate_bias, *fc2_bias;
    // Of matrices that lie transposed, the outputs' weights side by side: elements from one k to the next. 0: rows along k.
    int64_t first_step, second_step;
    int64_t interleaved;                   // gate and fc1 take turns in one transposed matrix, which `gate` is then
    int64_t fc1_bias_step, gate_bias_step; // elements from one output's to the next
    int64_t bias_is_bf16, start, rows;
};

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even, as torch rounds
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// How an expert is computed.
enum Mode {
    FLOATS,         // float32 products of float32 weights, or of others unpacked a block at a time
    BF16_PRODUCTS,  // bfloat16 dot products
    DIGIT_PRODUCTS  // int8 codes times the digits of fixed-point rows: exact sums of integers
};

struct RowUnit {
    double unit, raised;  // what one stands for, and what the raised codes add to a row's sums
    int64_t digits;       // bytes, the same for all rows of a chunk
};

struct Work {
    Expert expert;
    Mode mode;
    int64_t ldx, ldh;                         // elements from a row to the next of x and hidden, as computed
    const void *x;                            // rows in the form that `mode` computes with
    void *x_made, *hidden, *hidden_made;      // scratch: those rows, act(fc1), and that in the form for fc2
    RowUnit *x_units, *hidden_units;          // of DIGIT_PRODUCTS: one a row
    int64_t due[PHASES];                      // items of this expert that must be done before one of phase p begins
};

struct alignas(LINE) Count {
    std::atomic<int64_t> done{0};
};

struct Item {
    int32_t work, phase;
    int64_t from, to;
};

struct Job {
    std::vector<Work> works;
    std::vector<Item> items;
    int64_t model_width, ffn_width;
    int rows_dtype, weights_dtype, activation;
    float alpha, limit, offset;  // of CLAMPED_SWIGLU
    const char* rows;
    char* out;
    int threads;
    std::atomic<int64_t> next{0};
    std::unique_ptr<Count[]> counts;  // items done, by expert
    const struct Routines* routines;
};

using PanelFn = void (*)(const void* x, int64_t ldx, int64_t rows, const void* weights, int64_t n0, int64_t n1,
                         int64_t K, const char* next, void* sums);

struct Pieces {  // of a transposed matrix: `step` bytes from one k to the next, for `depth` of them
    const char* at;
    int64_t step, depth;
};

using ColumnsFn = void (*)(const void* x, int64_t ldx, int64_t rows, const void* weights, int64_t step, int64_t width,
                           int64_t K, const Pieces* next, float* sums);

struct Routines {
    PanelFn floats_f32, floats_bf16, floats_i8, bf16_bf16, digits_i8;
    ColumnsFn columns_f32, columns_bf16, columns_bf16_bf16;
    void (*finish)(const Job&, const Work&, bool first, int64_t row, int64_t rows, int64_t n0, int64_t n1,
                   const void* sums, const void* gate_sums);
    void (*digits)(const void* x, int dtype, int64_t width, int64_t rows, int64_t from_row, bool all_three, int8_t* into,
                   int64_t ld, RowUnit* units);
};

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// ---- any processor: vectors of the compiler's own -----------------------------------------------------------------
#define TARGET
#define MORE_ROUTINES
namespace generic {
typedef float Vec __attribute__((vector_size(32)));
struct Floats {
    using X = float; using W = float; using XV = Vec; using Acc = Vec; using Sum = float;
    static constexpr int STEP = 8, MAX_R = 3, N = 4, COLUMN_VECTORS = 2, COLUMN_ROWS = 3;
    static inline Acc zero() { return Vec{}; }
    static inline XV spread(float value) { return value - Vec{}; }
    static inline XV load_x(const float* p) { Vec v; std::memcpy(&v, p, 32); return v; }
    static inline XV load_w(const float* p) { return load_x(p); }
    static inline XV load_x_part(const float* p, int64_t n) { Vec v{}; std::memcpy(&v, p, size_t(n) * 4); return v; }
    static inline XV load_w_part(const float* p, int64_t n) { return load_x_part(p, n); }
    static inline Acc mac(Acc a, XV x, XV w) { return a + x * w; }
    static inline void store_sums(const Acc* a, float* out) {
        for (int n = 0; n < N; ++n) {
            const Vec v = a[n];
            out[n] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
        }
    }
};
#include "tiles.inc"
#include "columns.inc"
#include "epilogue.inc"
}  // namespace generic
#undef MORE_ROUTINES
#undef TARGET

#ifdef MOE_X86
// ---- AVX2 with FMA ------------------------------------------------------------------------------------------------
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define MORE_ROUTINES
namespace avx2 {
struct Floats {
    using X = float; using W = float; using XV = __m256; using Acc = __m256; using Sum = float;
    static constexpr int STEP = 8, MAX_R = 3, N = 4, COLUMN_VECTORS = 3, COLUMN_ROWS = 4;
    TARGET static inline Acc zero() { return _mm256_setzero_ps(); }
    TARGET static inline XV spread(float value) { return _mm256_set1_ps(value); }
    TARGET static inline XV load_x(const float* p) { return _mm256_loadu_ps(p); }
    TARGET static inline XV load_w(const float* p) { return _mm256_loadu_ps(p); }
    TARGET static inline XV load_x_part(const float* p, int64_t n) {
        alignas(32) static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
        return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + 8 - n)));
    }
    TARGET static inline XV load_w_part(const float* p, int64_t n) { return load_x_part(p, n); }
    TARGET static inline Acc mac(Acc a, XV x, XV w) { return _mm256_fmadd_ps(x, w, a); }
    TARGET static inline void store_sums(const Acc* a, float* out) {
        const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
        const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
        const __m256d lo = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        const __m256d hi = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        const __m256 all = _mm256_add_ps(_mm256_castpd_ps(lo), _mm256_castpd_ps(hi));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
};
#include "tiles.inc"
#include "columns.inc"
#include "epilogue.inc"
}  // namespace avx2
#undef MORE_ROUTINES
#undef TARGET

// ---- AVX-512 ------------------------------------------------------------------------------------------------------
#define AVX512_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"
#define TARGET __attribute__((target(AVX512_TARGET)))
#define MORE_ROUTINES
namespace avx512 {
#include "avx512.inc"
#include "tiles.inc"
#include "columns.inc"
#include "epilogue.inc"
}  // namespace avx512
#undef MORE_ROUTINES
#undef TARGET

// ---- AVX-512 with bfloat16 and int8 dot products --------------------------------------------------------------------
#define TARGET __attribute__((target(AVX512_TARGET ",avx512vnni")))
#define MORE_ROUTINES r.digits_i8 = any_panel<Digits, AsIs<Digits>>;
namespace avx512_vnni {
#include "avx512.inc"
#include "avx512_vnni.inc"
#include "tiles.inc"
#include "columns.inc"
#include "epilogue.inc"
}  // namespace avx512_vnni
#undef MORE_ROUTINES
#undef TARGET

#define TARGET __attribute__((target(AVX512_TARGET ",avx512vnni,avx512bf16")))
#define MORE_ROUTINES                              \
    r.digits_i8 = any_panel<Digits, AsIs<Digits>>; \
    r.bf16_bf16 = any_panel<Bf16Pairs, AsIs<Bf16Pairs>>; \
    r.columns_bf16_bf16 = columns<Bf16Columns>;
namespace avx512_bf16 {
#include "avx512.inc"
#include "avx512_vnni.inc"
#include "avx512_bf16.inc"
#include "tiles.inc"
#include "columns.inc"
#include "epilogue.inc"
}  // namespace avx512_bf16
#undef MORE_ROUTINES
#undef TARGET
#endif  // MOE_X86

int best_level() {
#ifdef MOE_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return GENERIC;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    if (!__builtin_cpu_supports("avx512vnni")) return AVX512;
    return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512_VNNI;
#else
    return GENERIC;
#endif
}

const Routines& routines_of(int level) {
#ifdef MOE_X86
    switch (level) {
        case AVX512_BF16: return avx512_bf16::routines;
        case AVX512_VNNI: return avx512_vnni::routines;
        case AVX512: return avx512::routines;
        case AVX2: return avx2::routines;
    }
#endif
    return generic::routines;
}

// An integer sum must fit in 32 bits: K products of at most 255 * 128.
constexpr int64_t WIDEST_DIGITS = INT32_MAX / (255 * 128);

Mode mode_of(const Job& job) {
    const Routines& r = *job.routines;
    if (job.weights_dtype == BF16 && r.bf16_bf16) return BF16_PRODUCTS;
    const bool narrow = job.model_width <= WIDEST_DIGITS && job.ffn_width <= WIDEST_DIGITS;
    return job.weights_dtype == I8 && r.digits_i8 && narrow ? DIGIT_PRODUCTS : FLOATS;
}

// Elements from a row to the next: not a power of two, or the rows of a tile would share a few sets of the cache.
inline int64_t padded(int64_t width, int64_t size) { return round_up(width, 64 / size) + 64 / size; }

struct Arena {  // hands out pieces of the scratch space; with no space, adds up how much is needed
    char* base;
    int64_t used = 0;
    template <class P>
    void take(P& pointer, int64_t bytes) {
        pointer = base ? reinterpret_cast<P>(base + used) : nullptr;
        used += round_up(bytes, 64);
    }
};

void lay_out(const Job& job, Work& work, Arena& arena) {
    const int64_t rows = work.expert.rows, D = job.model_width, F = job.ffn_width;
    work.x_made = work.hidden_made = nullptr;
    work.x_units = work.hidden_units = nullptr;
    if (work.mode == DIGIT_PRODUCTS) {
        work.ldx = padded(D, 1);
        work.ldh = F;
        arena.take(work.x_made, rows * DIGITS * work.ldx);
        arena.take(work.x_units, rows * int64_t(sizeof(RowUnit)));
        arena.take(work.hidden, rows * F * 4);
        arena.take(work.hidden_made, rows * DIGITS * padded(F, 1));
        arena.take(work.hidden_units, rows * int64_t(sizeof(RowUnit)));
        work.x = work.x_made;
        return;
    }
    const int64_t size = work.mode == BF16_PRODUCTS ? 2 : 4;
    work.ldx = padded(D, size);
    work.ldh = padded(F, size);
    arena.take(work.x_made, rows * work.ldx * size);
    arena.take(work.hidden, work.expert.fc2 ? rows * work.ldh * size : 0);
    work.x = work.x_made;
}

// Bytes of a weight as stored.
inline int64_t weight_size(const Job& job) { return job.weights_dtype == F32 ? 4 : job.weights_dtype == BF16 ? 2 : 1; }

// Outputs of one item: so many that its weights take a while to read, yet all threads have some.
int64_t outputs_of_item(const Job& job, bool first, int64_t matrices, bool transposed) {
    const int64_t K = first ? job.model_width : job.ffn_width, width = first ? job.ffn_width : job.model_width;
    const int64_t panels = (width + PANEL_STRIDE - 1) / PANEL_STRIDE;
    const int64_t enough = ITEM_BYTES / (PANEL_STRIDE * K * weight_size(job) * matrices);
    const int64_t least = transposed ? COLUMNS / (PANEL_STRIDE * matrices) : 1;
    const int64_t wanted = enough > least ? enough : least;
    const int64_t shared = panels * int64_t(job.works.size()) / (8 * job.threads);
    const int64_t some = wanted < shared ? wanted : shared;
    return (some > 1 ? some : 1) * PANEL_STRIDE;
}

// Of a linear layer by itself, whose few panels would leave some threads with one less: as many items for each thread.
int64_t outputs_of_linear(const Job& job) {
    const int64_t width = job.ffn_width, most = outputs_of_item(job, true, 1, false), threads = job.threads > 1 ? job.threads : 1;
    if (most > PANEL_STRIDE) return most;
    const int64_t items = round_up((width + most - 1) / most, threads);
    return round_up((width + items - 1) / items, 4);
}

void list_phase(Job& job, int64_t index, int32_t phase) {
    if (index < 0 || index >= int64_t(job.works.size())) return;
    Work& work = job.works[size_t(index)];
    const bool digits = work.mode == DIGIT_PRODUCTS, rows = phase == ROWS || phase == HIDDEN;
    const int64_t before = int64_t(job.items.size());
    const int64_t width = rows ? work.expert.rows : phase == FIRST ? job.ffn_width : job.model_width;
    const bool transposed = phase == FIRST ? work.expert.first_step : work.expert.second_step;
    const int64_t matrices = phase == FIRST && work.expert.gate ? 2 : 1;
    const int64_t step = phase == FIRST && !work.expert.fc2 ? outputs_of_linear(job)
                         : !rows  ? outputs_of_item(job, phase == FIRST, matrices, transposed)
                         : digits ? DIGIT_ROWS
                                  : CHUNK;
    if (phase <= FIRST || (work.expert.fc2 && (phase != HIDDEN || digits)))
        for (int64_t from = 0; from < width; from += step)
            job.items.push_back({int32_t(index), phase, from, from + step < width ? from + step : width});
    if (phase + 1 < PHASES) work.due[phase + 1] = work.due[phase] + int64_t(job.items.size()) - before;
}

// An expert's phases are an expert apart, so that what an item waits for was done a while ago.
void list_items(Job& job) {
    const int64_t experts = int64_t(job.works.size());
    for (int64_t step = 0; step < experts + PHASES - 1; ++step)
        for (int32_t phase = 0; phase < PHASES; ++phase) list_phase(job, step - phase, phase);
    job.counts.reset(new Count[size_t(experts)]);
}

void convert(const Job& job, const Work& work, int64_t from, int64_t to) {
    const int64_t D = job.model_width;
    const int64_t size = job.rows_dtype == BF16 ? 2 : 4;
    const char* rows = job.rows + (work.expert.start + from) * D * size;
    if (work.mode == DIGIT_PRODUCTS) {
        int8_t* into = static_cast<int8_t*>(work.x_made) + from * DIGITS * work.ldx;
        job.routines->digits(rows, job.rows_dtype, D, to - from, D, job.rows_dtype == F32, into, work.ldx, work.x_units + from);
        return;
    }
    for (int64_t m = 0; m < to - from; ++m) {
        const float* floats = reinterpret_cast<const float*>(rows) + m * D;
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(rows) + m * D;
        float* into = static_cast<float*>(work.x_made) + (from + m) * work.ldx;
        uint16_t* into_halves = static_cast<uint16_t*>(work.x_made) + (from + m) * work.ldx;
        if (work.mode == BF16_PRODUCTS && job.rows_dtype == BF16)
            std::memcpy(into_halves, halves, size_t(D) * 2);
        else if (work.mode == BF16_PRODUCTS)
            for (int64_t i = 0; i < D; ++i) into_halves[i] = to_bf16(floats[i]);
        else if (job.rows_dtype == BF16)
            for (int64_t i = 0; i < D; ++i) into[i] = from_bf16(halves[i]);
        else
            std::memcpy(into, floats, size_t(D) * 4);
    }
}

PanelFn panel_of(const Job& job, Mode mode) {
    const Routines& r = *job.routines;
    if (mode == DIGIT_PRODUCTS) return r.digits_i8;
    if (mode == BF16_PRODUCTS) return r.bf16_bf16;
    return job.weights_dtype == I8 ? r.floats_i8 : job.weights_dtype == BF16 ? r.floats_bf16 : r.floats_f32;
}

ColumnsFn columns_of(const Job& job, Mode mode) {
    const Routines& r = *job.routines;
    if (mode == BF16_PRODUCTS) return r.columns_bf16_bf16;
    return job.weights_dtype == BF16 ? r.columns_bf16 : r.columns_f32;
}

// The weights of an item's outputs from n on: as they lie, the first pieces of them.
Pieces weights_at(const Job& job, const Item& item, int64_t n) {
    const Expert& e = job.works[size_t(item.work)].expert;
    const bool first = item.phase == FIRST, both = first && e.interleaved;
    const int64_t K = first ? job.model_width : job.ffn_width, step = first ? e.first_step : e.second_step;
    const int64_t apart = step ? (both ? 2 : 1) : K;  // from one output to the next
    const char* base = static_cast<const char*>(both ? e.gate : first ? e.fc1 : e.fc2);
    return {base + n * apart * weight_size(job), (step ? step : K) * weight_size(job), step ? K : 1};
}

inline bool reads_weights(const Item* item) { return item && (item->phase == FIRST || item->phase == SECOND); }

// As multiply() below, where the matrices lie transposed.
void multiply_columns(const Job& job, const Item& item, const Item* then) {
    alignas(64) float sums[CHUNK * COLUMNS], gate_sums[CHUNK * COLUMNS];
    alignas(64) float values[CHUNK * PANEL_STRIDE], gates[CHUNK * PANEL_STRIDE];
    const Work& work = job.works[size_t(item.work)];
    const Expert& e = work.expert;
    const bool first = item.phase == FIRST, both = first && e.interleaved, apart = first && e.gate && !both;
    const ColumnsFn columns = columns_of(job, work.mode);
    const int64_t K = first ? job.model_width : job.ffn_width, step = first ? e.first_step : e.second_step;
    const int64_t ld = first ? work.ldx : work.ldh, x_size = work.mode == BF16_PRODUCTS ? 2 : 4;
    const char* x = static_cast<const char*>(first ? work.x : work.hidden);
    const int64_t halves = both ? 2 : 1, outputs = COLUMNS / halves;
    for (int64_t n0 = item.from; n0 < item.to; n0 += outputs) {
        const int64_t n1 = n0 + outputs < item.to ? n0 + outputs : item.to;
        const Pieces here = weights_at(job, item, n0);
        const Pieces gate{static_cast<const char*>(e.gate) + n0 * weight_size(job), here.step, K};
        Pieces after{};
        if (n1 < item.to) after = weights_at(job, item, n1);
        else if (reads_weights(then)) after = weights_at(job, *then, then->from);
        for (int64_t m = 0; m < e.rows; m += CHUNK) {
            const int64_t rows = e.rows - m < CHUNK ? e.rows - m : CHUNK;
            const char* row = x + m * ld * x_size;
            columns(row, ld, rows, here.at, step, (n1 - n0) * halves, K, m ? nullptr : apart ? &gate : &after, sums);
            if (apart) columns(row, ld, rows, gate.at, step, n1 - n0, K, m ? nullptr : &after, gate_sums);
            for (int64_t n = n0; n < n1; n += PANEL_STRIDE) {
                const int64_t end = n + PANEL_STRIDE < n1 ? n + PANEL_STRIDE : n1;
                for (int64_t r = 0; r < rows; ++r) {
                    const float* own = sums + r * COLUMNS + (n - n0) * halves;
                    const float* others = both ? own : gate_sums + r * COLUMNS + (n - n0);
                    float *value = values + r * PANEL_STRIDE, *gate_value = gates + r * PANEL_STRIDE;
                    for (int64_t i = 0; i < end - n; ++i) value[i] = own[both ? 2 * i + 1 : i];
                    if (both || apart)
                        for (int64_t i = 0; i < end - n; ++i) gate_value[i] = others[i * halves];
                }
                job.routines->finish(job, work, first, m, rows, n, end, values, both || apart ? gates : nullptr);
            }
        }
    }
}

// fc1 and the gate, or fc2, of the item's outputs and all rows of its expert. `then` is what this thread does after it.
void multiply(const Job& job, const Item& item, const Item* then) {
    alignas(64) char sums[SUM_ROWS * PANEL_STRIDE * 4], gate_sums[SUM_ROWS * PANEL_STRIDE * 4];
    const Work& work = job.works[size_t(item.work)];
    const Expert& e = work.expert;
    const bool first = item.phase == FIRST, digits = work.mode == DIGIT_PRODUCTS;
    if (first ? e.first_step : e.second_step) return multiply_columns(job, item, then);
    const PanelFn panel = panel_of(job, work.mode);
    const int64_t K = first ? job.model_width : job.ffn_width;
    const void* x = first ? work.x : digits ? work.hidden_made : work.hidden;
    const int64_t ld = first ? work.ldx : digits ? padded(K, 1) : work.ldh;
    const int64_t chunk = digits ? DIGIT_ROWS : CHUNK, size = digits ? 1 : work.mode == BF16_PRODUCTS ? 2 : 4;
    const RowUnit* units = first ? work.x_units : work.hidden_units;
    const void* gate = first ? e.gate : nullptr;
    for (int64_t n0 = item.from; n0 < item.to; n0 += PANEL_STRIDE) {
        const int64_t n1 = n0 + PANEL_STRIDE < item.to ? n0 + PANEL_STRIDE : item.to;
        const char* after = weights_at(job, item, n1 < item.to ? n1 : item.from).at;
        if (n1 == item.to && reads_weights(then)) after = weights_at(job, *then, then->from).at;
        const char* gate_after = after;
        if (gate) after = static_cast<const char*>(gate) + n0 * K * weight_size(job);
        for (int64_t m = 0; m < e.rows; m += chunk) {
            const int64_t rows = e.rows - m < chunk ? e.rows - m : chunk;
            const int64_t at = digits ? m * DIGITS : m, many = digits ? rows * units[m].digits : rows;
            const char* here = static_cast<const char*>(x) + at * ld * size;
            panel(here, ld, many, first ? e.fc1 : e.fc2, n0, n1, K, m ? nullptr : after, sums);
            if (gate) panel(here, ld, many, gate, n0, n1, K, m ? nullptr : gate_after, gate_sums);
            job.routines->finish(job, work, first, m, rows, n0, n1, sums, gate ? gate_sums : nullptr);
        }
    }
}

void do_item(const Job& job, const Item& item, const Item* then) {
    const Work& work = job.works[size_t(item.work)];
    switch (item.phase) {
        case ROWS: convert(job, work, item.from, item.to); break;
        case HIDDEN: {
            const int64_t ld = padded(job.ffn_width, 1);
            const float* rows = static_cast<const float*>(work.hidden) + item.from * work.ldh;
            int8_t* into = static_cast<int8_t*>(work.hidden_made) + item.from * DIGITS * ld;
            job.routines->digits(rows, F32, job.ffn_width, item.to - item.from, work.ldh, job.rows_dtype == F32, into,
                                 ld, work.hidden_units + item.from);
            break;
        }
        default: multiply(job, item, then);
    }
}

void yield_a_little(int turns) {
#ifdef MOE_X86
    if (turns % 64) return _mm_pause();
#endif
    std::this_thread::yield();
}

// What every thread does: claim the next item until there is none. Items are claimed in order, and wait for earlier ones
// only, so there is always one that can be done. The next one is claimed before this one is computed, so that the first of
// its weights are on their way by then.
void work_on(void* pointer) {
    Job& job = *static_cast<Job*>(pointer);
    const int64_t total = int64_t(job.items.size());
    for (int64_t i = job.next.fetch_add(1); i < total;) {
        const int64_t then = job.next.fetch_add(1);
        const Item& item = job.items[size_t(i)];
        std::atomic<int64_t>& done = job.counts[size_t(item.work)].done;
        const int64_t due = job.works[size_t(item.work)].due[item.phase];
        for (int turns = 1; done.load(std::memory_order_acquire) < due; ++turns) yield_a_little(turns);
        do_item(job, item, then < total ? &job.items[size_t(then)] : nullptr);
        done.fetch_add(1, std::memory_order_release);
        i = then;
    }
}

using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<ParallelFn> openmp_parallel{nullptr};
std::atomic<long> openmp_process{0};

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
    return long(getpid());
#else
    return 1;
#endif
}

void run_on_threads(Job& job, int threads) {
    const ParallelFn parallel = openmp_parallel.load();
    if (threads <= 1) return work_on(&job);
    // An OpenMP runtime does not survive a fork.
    if (parallel && openmp_process.load() == process_id()) return parallel(work_on, &job, unsigned(threads), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work_on, &job);
    work_on(&job);
    for (std::thread& other : others) other.join();
}

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// What this is built from knows: 3 since it computes linear layers and reads transposed matrices. Python code that asks
// for more leaves it alone.
EXPORT int moe_fused_version() { return 3; }

// The best instruction set of this machine, one of enum Level.
EXPORT int moe_fused_level() { return best_level(); }

// Threads come from the OpenMP runtime whose GOMP_parallel this is; null: threads of our own, made for each call.
EXPORT void moe_fused_use_openmp(void* gomp_parallel) {
    openmp_process = process_id();
    openmp_parallel = reinterpret_cast<ParallelFn>(gomp_parallel);
}

struct MoeFusedCall {
    const void* rows;
    void* out;
    const void* experts;  // num_experts of struct Expert
    int64_t num_experts, model_width, ffn_width;
    int64_t rows_dtype, weights_dtype, activation, level, threads;
    double alpha, limit, offset;  // of CLAMPED_SWIGLU
};

// Compute a call with `scratch`, of as many bytes as the same call with a null scratch returns. Below 0: out of memory.
EXPORT int64_t moe_fused_run(const MoeFusedCall* call, void* scratch) {
    try {
        Job job;
        job.model_width = call->model_width;
        job.ffn_width = call->ffn_width;
        job.rows_dtype = int(call->rows_dtype);
        job.weights_dtype = int(call->weights_dtype);
        job.activation = int(call->activation);
        job.alpha = float(call->alpha);
        job.limit = float(call->limit);
        job.offset = float(call->offset);
        job.rows = static_cast<const char*>(call->rows);
        job.out = static_cast<char*>(call->out);
        const int best = best_level();
        job.routines = &routines_of(call->level < best ? int(call->level) : best);
        Arena arena{scratch ? reinterpret_cast<char*>(round_up(int64_t(scratch), 64)) : nullptr};
        const Expert* experts = static_cast<const Expert*>(call->experts);
        for (int64_t i = 0; i < call->num_experts; ++i) {
            Work work{};
            work.expert = experts[i];
            work.mode = mode_of(job);
            lay_out(job, work, arena);
            job.works.push_back(work);
        }
        if (!scratch) return arena.used + 64;
        job.threads = int(call->threads);
        list_items(job);
        run_on_threads(job, job.threads);
        return 0;
    } catch (const std::exception&) {
        return -1;
    }
}
