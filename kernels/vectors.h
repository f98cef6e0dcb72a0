// Vectors of channels on a CPU, for the compiled kernels: every lane is a channel. No dependence on PyTorch.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(64)));
  typedef int32_t Integers __attribute__((vector_size(64)));
  typedef int32_t Integer;
  static constexpr int mantissa = 23, bias = 127, log_terms = 6;
  static constexpr float magic = 12582912.0f, smallest = -126.0f, largest = 127.0f;
};
template <> struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t Integers __attribute__((vector_size(64)));
  typedef int64_t Integer;
  static constexpr int mantissa = 52, bias = 1023, log_terms = 13;
  static constexpr double magic = 6755399441055744.0, smallest = -1022.0, largest = 1023.0;
};

// 2^f for |f| <= 1/2, highest power first: a Chebyshev fit in single precision (3e-9), the Taylor series in double.
constexpr float exp2_float[] = {1.5461445e-4f,  1.34004282e-3f, 9.61805668e-3f, 5.55032723e-2f,
                                2.40226509e-1f, 6.93147207e-1f, 1.0f};
constexpr double exp2_double[] = {
    1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10,  7.054911620801121e-09,
    1.0178086009239696e-07, 1.3215486790144305e-06, 1.525273380405984e-05, 1.5403530393381606e-04,
    1.3333558146428443e-03, 9.618129107628477e-03,  5.550410866482158e-02, 2.402265069591007e-01,
    6.931471805599453e-01,  1.0};
template <class T> struct Exp2;
template <> struct Exp2<float> { static constexpr const auto &terms = exp2_float; };
template <> struct Exp2<double> { static constexpr const auto &terms = exp2_double; };

template <class T> using Vector = typename Lanes<T>::Vector;
template <class T> constexpr int width = 64 / sizeof(T);

template <class T> inline Vector<T> load(const T *from, int lanes) {
  Vector<T> x = {};
  if (lanes == width<T>)
    std::memcpy(&x, from, sizeof x);
  else
    std::memcpy(&x, from, lanes * sizeof(T));
  return x;
}

template <class T> inline void store(T *to, Vector<T> x, int lanes) {
  if (lanes == width<T>)
    std::memcpy(to, &x, sizeof x);
  else
    std::memcpy(to, &x, lanes * sizeof(T));
}

// 2^x; exactly zero below the range of normal numbers.
template <class T> inline Vector<T> exp2(Vector<T> x) {
  using L = Lanes<T>;
  const Vector<T> least = Vector<T>{} + L::smallest, most = Vector<T>{} + L::largest;
  const auto vanishes = x < least;
  x = vanishes ? least : x;
  x = x > most ? most : x;
  const Vector<T> rounded = (x + L::magic) - L::magic;
  const Vector<T> f = x - rounded;
  Vector<T> y = Vector<T>{} + Exp2<T>::terms[0];
#pragma GCC unroll 16
  for (size_t i = 1; i < sizeof(Exp2<T>::terms) / sizeof(T); ++i) y = y * f + Exp2<T>::terms[i];
  typename L::Integers power = __builtin_convertvector(rounded, typename L::Integers);
  power = (power + L::bias) << L::mantissa;
  Vector<T> scale;
  std::memcpy(&scale, &power, sizeof scale);
  return vanishes ? Vector<T>{} : y * scale;
}

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.69314718055994531;

// Scratch of one call, aligned for vectors.
template <class T> struct Buffer {
  std::vector<char> memory;
  Vector<T> *data;
  explicit Buffer(int64_t vectors) : memory((vectors + 1) * 64, 0) {
    data = reinterpret_cast<Vector<T> *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  Vector<T> *at(int64_t i) { return data + i; }
};

// Results below the range of normal numbers count as zero: they are slow, and nothing depends on them.
struct FlushSubnormals {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#endif
};

// What belongs to one sequence and one vector of channels, in the arguments of either kernel.
template <class T, class Arguments> struct Rows {
  const Arguments &in;
  int64_t b, channel;
  int lanes;
  Rows(const Arguments &in, int64_t b, int64_t block) : in(in), b(b), channel(block * width<T>) {
    const int64_t left = in.channels - channel;
    lanes = left < width<T> ? int(left) : width<T>;
  }
  Vector<T> row(const void *base, int64_t batch, int64_t token, int64_t t) const {
    return load(static_cast<const T *>(base) + b * batch + t * token + channel, lanes);
  }
  int64_t dense(int64_t t) const { return (b * in.length + t) * in.channels + channel; }
  Vector<T> parameter(const void *base) const { return load(static_cast<const T *>(base) + channel, lanes); }
  bool starts(int64_t t) const { return in.starts && in.starts[b * in.starts_batch + t]; }
  // where the state before a tile of tokens is kept, so many vectors of it
  T *kept(int64_t tile, int64_t vectors) const {
    const int64_t tiles = (in.length + in.tile - 1) / in.tile, blocks = (in.channels + width<T> - 1) / width<T>;
    return static_cast<T *>(in.checkpoints) + ((b * tiles + tile) * blocks * width<T> + channel) * vectors;
  }
};

}  // namespace
