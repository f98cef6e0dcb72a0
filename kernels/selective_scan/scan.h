// What the passes of scan.cpp share: their arguments, softplus, and how a vector of channels is read and written.

#pragma once

#include "../vectors.h"

extern "C" struct Arguments {  // the order of compiled.py's
  const void *u, *delta, *A, *B, *C, *D, *z, *bias, *initial;
  const uint8_t *starts;
  void *y, *final_state, *checkpoints, *sums;
  const void *before, *entering;
  void *grad_entering;
  const void *grad_y, *grad_final;
  void *grad_u, *grad_delta, *grad_A, *grad_B, *grad_C, *grad_D, *grad_z, *grad_bias, *grad_initial;
  int64_t batch, length, channels, states, tile, softplus;
  int64_t first_block, last_block;  // of channels, in vectors
  int64_t u_batch, u_token, delta_batch, delta_token, B_batch, B_token, C_batch, C_token, z_batch, z_token;
  int64_t grad_y_batch, grad_y_token, starts_batch;
};

namespace {

template <class T> inline Vector<T> sigmoid(Vector<T> x) { return T(1) / (exp2<T>(x * T(-log2_e)) + T(1)); }

// log(1 + y) for y in [0, 1], to full relative precision: 2 artanh(y / (2 + y)).
template <class T> inline Vector<T> log1p_unit(Vector<T> y) {
  // brought nearer to one: 1 + y = 2^e m with m below the square root of two
  const auto upper = y > Vector<T>{} + T(0.41421356237309503);
  const Vector<T> s = (upper ? y - T(1) : y) / (y + (upper ? Vector<T>{} + T(3) : Vector<T>{} + T(2)));
  const Vector<T> square = s * s;
  Vector<T> sum = Vector<T>{} + T(1.0 / (2 * Lanes<T>::log_terms + 1));
  for (int k = Lanes<T>::log_terms - 1; k >= 0; --k) sum = sum * square + T(1.0 / (2 * k + 1));
  return s * sum * T(2) + (upper ? Vector<T>{} + T(ln_2) : Vector<T>{});
}

// As PyTorch's softplus: the identity above 20. Its slope there is one, elsewhere the sigmoid.
template <class T> inline Vector<T> softplus(Vector<T> x, Vector<T> *slope = nullptr) {
  const auto negative = x < Vector<T>{}, linear = x > Vector<T>{} + T(20);
  const Vector<T> small = exp2<T>((negative ? x : -x) * T(log2_e)), one = Vector<T>{} + T(1);
  if (slope) *slope = linear ? one : (negative ? small : one) / (small + T(1));
  return linear ? x : (negative ? Vector<T>{} : x) + log1p_unit<T>(small);
}

template <class T> struct Block : Rows<T, Arguments> {
  using Rows<T, Arguments>::Rows, Rows<T, Arguments>::in, Rows<T, Arguments>::b, Rows<T, Arguments>::channel;
  using Rows<T, Arguments>::lanes, Rows<T, Arguments>::row, Rows<T, Arguments>::parameter;
  Vector<T> u(int64_t t) const { return row(in.u, in.u_batch, in.u_token, t); }
  Vector<T> z(int64_t t) const { return row(in.z, in.z_batch, in.z_token, t); }
  Vector<T> raw_step(int64_t t) const {
    const Vector<T> raw = row(in.delta, in.delta_batch, in.delta_token, t);
    return in.bias ? raw + parameter(in.bias) : raw;
  }
  // step sizes of some tokens and, if asked for, the slopes of their softplus: together, so that they overlap
  void steps(int64_t first, int64_t last, Vector<T> *to, Vector<T> *slopes = nullptr) const {
    for (int64_t t = first; t < last; ++t, ++to)
      *to = in.softplus ? softplus<T>(raw_step(t), slopes ? slopes++ : nullptr) : raw_step(t);
  }
  const T *B(int64_t t) const { return static_cast<const T *>(in.B) + b * in.B_batch + t * in.B_token; }
  const T *C(int64_t t) const { return static_cast<const T *>(in.C) + b * in.C_batch + t * in.C_token; }
  // (D, N) or (B, D, N) to vectors of channels and back
  void gather(const void *base, bool batched, Vector<T> *to) const {
    const T *from = static_cast<const T *>(base) + ((batched ? b * in.channels : 0) + channel) * in.states;
    for (int64_t n = 0; n < in.states; ++n)
      for (int lane = 0; lane < lanes; ++lane) to[n][lane] = from[lane * in.states + n];
  }
  void scatter(const Vector<T> *from, void *base, bool batched) const {
    T *to = static_cast<T *>(base) + ((batched ? b * in.channels : 0) + channel) * in.states;
    for (int64_t n = 0; n < in.states; ++n)
      for (int lane = 0; lane < lanes; ++lane) to[lane * in.states + n] = from[n][lane];
  }
  T *checkpoint(int64_t tile) const { return this->kept(tile, in.states); }
  // where a tile keeps one number for each of its channels
  int64_t of_tile(int64_t tile) const {
    return (b * ((in.length + in.tile - 1) / in.tile) + tile) * in.channels + channel;
  }
  Vector<T> before(int64_t tile) const { return load(static_cast<const T *>(in.before) + of_tile(tile), lanes); }
  // tokens that a state from before the sequence reaches
  int64_t reach() const {
    if (!in.starts) return in.length;
    const uint8_t *row = in.starts + b * in.starts_batch;
    const void *found = std::memchr(row, 1, in.length);
    return found ? static_cast<const uint8_t *>(found) - row : in.length;
  }
};

// Whether in any of the lanes a decay of 2 to this power leaves what can be seen beside an output; living.py's limit.
template <class T> inline bool lives(Vector<T> power, int lanes) {
  constexpr T least = T(-1.5) * Lanes<T>::mantissa;
  for (int lane = lanes; lane < width<T>; ++lane) power[lane] = least;
  const auto visible = power > Vector<T>{} + least;
  int64_t parts[8], any = 0;
  std::memcpy(parts, &visible, sizeof parts);
  for (int64_t part : parts) any |= part;
  return any;
}

// Tiles at whose beginning something of a state is left that entered a block of channels.
template <class T> int64_t living_tiles(const Block<T> &block, const Vector<T> *A) {
  const int64_t reach = block.reach(), tile = block.in.tile;
  int64_t tiles = 0;
  for (; tiles * tile < reach; ++tiles) {
    bool any = false;
    for (int64_t n = 0; n < block.in.states && !any; ++n) any = lives<T>(A[n] * block.before(tiles), block.lanes);
    if (!any) break;
  }
  return tiles;
}

}  // namespace
