// Fake quantization in one pass over memory each way; see kernels.py, which compiles and calls it.
//
// Everything is computed in float32. Sums are taken over blocks and added in order, so that they do not depend on the
// number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4096;    // numbers whose sum is taken in float32
constexpr int64_t ALONE = 1 << 14; // fewer numbers are not worth a second thread

inline float read(float value) { return value; }

inline float read(uint16_t value) { // bfloat16: the upper half of a float
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void write(float value, float &target) { target = value; }

inline void write(float value, uint16_t &target) { // to the nearest, half to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    target = uint16_t(value != value ? 0x7fc0 : rounded);
}

inline float code_of(float scaled, float low, float high) { // NaN stays NaN
    float code = std::nearbyint(scaled);
    code = code < low ? low : code;
    return code > high ? high : code;
}

template <typename T>
void round_part(const T *x, T *y, int64_t count, float step, float low, float high) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        write(code_of(read(x[i]) / step, low, high) * step, y[i]);
}

// The gradient by x, where it is wanted, and the sum of the gradient by the step.
template <typename T, bool WANTED>
float gradients_part(const T *grad, const T *x, T *grad_x, int64_t count, float step, const float *range) {
    const float low = range[0], high = range[1], first = range[2], last = range[3];
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        float scaled = read(x[i]) / step, slope = code_of(scaled, low, high), g = read(grad[i]);
        bool inside = (scaled > first) & (scaled < last);
        total += (inside ? slope - scaled : slope) * g;
        if (WANTED)
            write(inside ? g : 0.0f, grad_x[i]);
    }
    return total;
}

template <typename T>
void round_all(const T *x, T *y, int64_t count, float step, float low, float high, int threads) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (count > ALONE)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t at = block * BLOCK;
        round_part(x + at, y + at, at + BLOCK < count ? BLOCK : count - at, step, low, high);
    }
}

template <typename T>
double gradients_all(const T *grad, const T *x, T *grad_x, int64_t count, float step, const float *range, int threads) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<float> sums(blocks);
#pragma omp parallel for num_threads(threads) if (count > ALONE)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t at = block * BLOCK, part = at + BLOCK < count ? BLOCK : count - at;
        sums[block] = grad_x ? gradients_part<T, true>(grad + at, x + at, grad_x + at, part, step, range)
                             : gradients_part<T, false>(grad + at, x + at, nullptr, part, step, range);
    }
    double total = 0;
    for (float sum : sums)
        total += sum;
    return total;
}

} // namespace

extern "C" {

void round_float(const float *x, float *y, int64_t count, float step, float low, float high, int threads) {
    round_all(x, y, count, step, low, high, threads);
}

void round_bfloat16(const uint16_t *x, uint16_t *y, int64_t count, float step, float low, float high, int threads) {
    round_all(x, y, count, step, low, high, threads);
}

double gradients_float(const float *grad, const float *x, float *grad_x, int64_t count, float step, const float *range,
                       int threads) {
    return gradients_all(grad, x, grad_x, count, step, range, threads);
}

double gradients_bfloat16(const uint16_t *grad, const uint16_t *x, uint16_t *grad_x, int64_t count, float step,
                          const float *range, int threads) {
    return gradients_all(grad, x, grad_x, count, step, range, threads);
}

// One step for each row, as for weights.

void round_rows(const float *x, float *y, int64_t rows, int64_t columns, const float *steps, float low, float high,
                int threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > ALONE)
    for (int64_t row = 0; row < rows; row++)
        round_part(x + row * columns, y + row * columns, columns, steps[row], low, high);
}

void gradients_rows(const float *grad, const float *x, float *grad_x, int64_t rows, int64_t columns, const float *steps,
                    const float *range, float *sums, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > ALONE)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * columns;
        sums[row] = gradients_part<float, true>(grad + at, x + at, grad_x + at, columns, steps[row], range);
    }
}
}
