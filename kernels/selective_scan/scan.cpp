// The selective scan on a CPU: vectors of channels, tiles of tokens, states kept at tile boundaries only.
//
// Every vector lane is a channel, so a token's states are N vectors and no sum crosses lanes until a tile is done. The
// forward may keep the state before every tile; the backward walks the tiles from the right, runs each again from there
// with its decays and states in cache, and carries the adjoint state. Gradients of B and C are summed over channels as
// vectors first. Equations: portable.py.

#include "../vectors.h"

extern "C" struct Arguments {  // the order of compiled.py's
  const void *u, *delta, *A, *B, *C, *D, *z, *bias, *initial;
  const uint8_t *starts;
  void *y, *final_state, *checkpoints;
  const void *grad_y, *grad_final;
  void *grad_u, *grad_delta, *grad_A, *grad_B, *grad_C, *grad_D, *grad_z, *grad_bias, *grad_initial;
  int64_t batch, length, channels, states, tile, softplus;
  int64_t first_block, last_block;  // of channels, in vectors
  int64_t u_batch, u_token, delta_batch, delta_token, B_batch, B_token, C_batch, C_token, z_batch, z_token, starts_batch;
};

namespace {

template <class T> inline Vector<T> sigmoid(Vector<T> x) { return T(1) / (exp2<T>(x * T(-log2_e)) + T(1)); }

// log(1 + y) for y in [0, 1], to full relative precision: 2 artanh(y / (2 + y)).
template <class T> inline Vector<T> log1p_unit(Vector<T> y) {
  // brought nearer to one: 1 + y = 2^e m with m below the square root of two
  const auto upper = y > Vector<T>{} + T(0.41421356237309503);
  const Vector<T> s = upper ? (y - T(1)) / (y + T(3)) : y / (y + T(2));
  const Vector<T> square = s * s;
  Vector<T> sum = Vector<T>{} + T(1.0 / (2 * Lanes<T>::log_terms + 1));
  for (int k = Lanes<T>::log_terms - 1; k >= 0; --k) sum = sum * square + T(1.0 / (2 * k + 1));
  return s * sum * T(2) + (upper ? Vector<T>{} + T(ln_2) : Vector<T>{});
}

// As PyTorch's softplus: the identity above 20.
template <class T> inline Vector<T> softplus(Vector<T> x) {
  const Vector<T> size = x < Vector<T>{} ? -x : x;
  const Vector<T> positive = x < Vector<T>{} ? Vector<T>{} : x;
  const Vector<T> y = positive + log1p_unit<T>(exp2<T>(size * T(-log2_e)));
  return x > Vector<T>{} + T(20) ? x : y;
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
  Vector<T> step(int64_t t) const { return in.softplus ? softplus<T>(raw_step(t)) : raw_step(t); }
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
};

template <class T> void forward(const Arguments &in) {
  const FlushSubnormals flush;
  const int64_t N = in.states, blocks = in.last_block - in.first_block;
  Buffer<T> state(blocks * N), rate(blocks * N);
  for (int64_t b = 0; b < in.batch; ++b) {
    for (int64_t i = 0; i < blocks; ++i) {
      const Block<T> block(in, b, in.first_block + i);
      block.gather(in.initial, true, state.at(i * N));
      block.gather(in.A, false, rate.at(i * N));
      for (int64_t n = 0; n < N; ++n) *rate.at(i * N + n) *= T(log2_e);
    }
    for (int64_t first = 0; first < in.length; first += in.tile) {
      const int64_t last = first + in.tile < in.length ? first + in.tile : in.length;
      for (int64_t i = 0; i < blocks; ++i) {
        const Block<T> block(in, b, in.first_block + i);
        Vector<T> *h = state.at(i * N);
        const Vector<T> *A = rate.at(i * N);
        if (in.checkpoints) std::memcpy(block.checkpoint(first / in.tile), h, N * 64);
        for (int64_t t = first; t < last; ++t) {
          const Vector<T> step = block.step(t), u = block.u(t), input = step * u;
          const T *B = block.B(t), *C = block.C(t);
          const T keep = block.starts(t) ? T(0) : T(1);
          Vector<T> y = {};
          for (int64_t n = 0; n < N; ++n) {
            const Vector<T> now = exp2<T>(step * A[n]) * keep * h[n] + input * B[n];
            h[n] = now;
            y += now * C[n];
          }
          if (in.D) y += u * block.parameter(in.D);
          if (in.z) {
            const Vector<T> z = block.z(t);
            y *= z * sigmoid<T>(z);
          }
          store(static_cast<T *>(in.y) + block.dense(t), y, block.lanes);
        }
      }
    }
    for (int64_t i = 0; i < blocks; ++i) Block<T>(in, b, in.first_block + i).scatter(state.at(i * N), in.final_state, true);
  }
}

// The vectors a backward works with: of one tile, and of every block of channels.
template <class T> struct Scratch {
  Buffer<T> decays, states, steps, grads, B, C;   // of a tile
  Buffer<T> adjoint, rate, rate_grad, D, bias;    // of the blocks
  Scratch(int64_t tile, int64_t N, int64_t blocks)
      : decays(tile * N), states((tile + 1) * N), steps(tile), grads(tile), B(tile * N), C(tile * N),
        adjoint(blocks * N), rate(blocks * N), rate_grad(blocks * N), D(blocks), bias(blocks) {}
};

// Run a tile again from its checkpoint; gradients before the gate, and the gate's own.
template <class T> void recompute(const Block<T> &block, Scratch<T> &s, int64_t i, int64_t first, int64_t last) {
  const Arguments &in = block.in;
  const int64_t N = in.states;
  const Vector<T> *A = s.rate.at(i * N);
  std::memcpy(s.states.at(0), block.checkpoint(first / in.tile), N * 64);
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = t - first;
    const Vector<T> step = block.step(t), u = block.u(t), input = step * u;
    const T *B = block.B(t), *C = block.C(t);
    const Vector<T> *before = s.states.at(row * N);
    Vector<T> *now = s.states.at((row + 1) * N), *decay = s.decays.at(row * N);
    const T keep = block.starts(t) ? T(0) : T(1);
    for (int64_t n = 0; n < N; ++n) {
      decay[n] = exp2<T>(step * A[n]) * keep;
      now[n] = decay[n] * before[n] + input * B[n];
    }
    *s.steps.at(row) = step;
    Vector<T> grad = load(static_cast<const T *>(in.grad_y) + block.dense(t), block.lanes);
    if (in.z) {
      Vector<T> y = {};
      for (int64_t n = 0; n < N; ++n) y += now[n] * C[n];
      if (in.D) y += u * block.parameter(in.D);
      const Vector<T> z = block.z(t), open = sigmoid<T>(z);
      const Vector<T> slope = open + z * open * (T(1) - open);
      store(static_cast<T *>(in.grad_z) + block.dense(t), grad * y * slope, block.lanes);
      grad *= z * open;
    }
    *s.grads.at(row) = grad;
  }
}

// Walk a tile from the right and fill its gradients.
template <class T> void walk_back(const Block<T> &block, Scratch<T> &s, int64_t i, int64_t first, int64_t last) {
  const Arguments &in = block.in;
  const int64_t N = in.states;
  const Vector<T> *A = s.rate.at(i * N);
  Vector<T> *adjoint = s.adjoint.at(i * N), *rate_grad = s.rate_grad.at(i * N);
  for (int64_t t = last - 1; t >= first; --t) {
    const int64_t row = t - first;
    const Vector<T> step = *s.steps.at(row), u = block.u(t), grad = *s.grads.at(row), input = step * u;
    const T *B = block.B(t), *C = block.C(t);
    const Vector<T> *before = s.states.at(row * N), *now = s.states.at((row + 1) * N), *decay = s.decays.at(row * N);
    Vector<T> *B_grad = s.B.at(row * N), *C_grad = s.C.at(row * N);
    Vector<T> input_grad = {}, step_grad = {};
    for (int64_t n = 0; n < N; ++n) {
      const Vector<T> g = adjoint[n] + grad * C[n];
      C_grad[n] += grad * now[n];
      B_grad[n] += g * input;
      input_grad += g * B[n];
      const Vector<T> carried = g * decay[n], p = carried * before[n];
      step_grad += p * A[n];
      rate_grad[n] += p * step;
      adjoint[n] = carried;
    }
    // the rates here are multiplied by log2(e)
    step_grad = step_grad * T(ln_2) + u * input_grad;
    Vector<T> u_grad = step * input_grad;
    if (in.D) {
      u_grad += grad * block.parameter(in.D);
      *s.D.at(i) += grad * u;
    }
    store(static_cast<T *>(in.grad_u) + block.dense(t), u_grad, block.lanes);
    if (in.softplus) {
      const Vector<T> raw = block.raw_step(t);
      step_grad *= raw > Vector<T>{} + T(20) ? Vector<T>{} + T(1) : sigmoid<T>(raw);
    }
    if (in.bias) *s.bias.at(i) += step_grad;
    store(static_cast<T *>(in.grad_delta) + block.dense(t), step_grad, block.lanes);
  }
}

// Sum a tile's gradients of B or C over the lanes, and clear them.
template <class T> void reduce(Buffer<T> &sums, void *out, int64_t offset, int64_t count) {
  T *to = static_cast<T *>(out) + offset;
  for (int64_t i = 0; i < count; ++i) {
    const Vector<T> x = *sums.at(i);
    T total = 0;
    for (int lane = 0; lane < width<T>; ++lane) total += x[lane];
    to[i] = total;
    *sums.at(i) = Vector<T>{};
  }
}

template <class T> void backward(const Arguments &in) {
  const FlushSubnormals flush;
  const int64_t N = in.states, blocks = in.last_block - in.first_block;
  Scratch<T> s(in.tile, N, blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    Block<T>(in, 0, in.first_block + i).gather(in.A, false, s.rate.at(i * N));
    for (int64_t n = 0; n < N; ++n) *s.rate.at(i * N + n) *= T(log2_e);
  }
  for (int64_t b = 0; b < in.batch; ++b) {
    for (int64_t i = 0; i < blocks; ++i)
      Block<T>(in, b, in.first_block + i).gather(in.grad_final, true, s.adjoint.at(i * N));
    for (int64_t first = (in.length - 1) / in.tile * in.tile; first >= 0; first -= in.tile) {
      const int64_t last = first + in.tile < in.length ? first + in.tile : in.length;
      for (int64_t i = 0; i < blocks; ++i) {
        const Block<T> block(in, b, in.first_block + i);
        recompute(block, s, i, first, last);
        walk_back(block, s, i, first, last);
      }
      reduce(s.B, in.grad_B, (b * in.length + first) * N, (last - first) * N);
      reduce(s.C, in.grad_C, (b * in.length + first) * N, (last - first) * N);
    }
    for (int64_t i = 0; i < blocks; ++i)
      Block<T>(in, b, in.first_block + i).scatter(s.adjoint.at(i * N), in.grad_initial, true);
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const Block<T> block(in, 0, in.first_block + i);
    block.scatter(s.rate_grad.at(i * N), in.grad_A, false);
    if (in.D) store(static_cast<T *>(in.grad_D) + block.channel, *s.D.at(i), block.lanes);
    if (in.bias) store(static_cast<T *>(in.grad_bias) + block.channel, *s.bias.at(i), block.lanes);
  }
}

}  // namespace

extern "C" {
void scan_forward_float32(const Arguments *in) { forward<float>(*in); }
void scan_forward_float64(const Arguments *in) { forward<double>(*in); }
void scan_backward_float32(const Arguments *in) { backward<float>(*in); }
void scan_backward_float64(const Arguments *in) { backward<double>(*in); }
}
