// The selective scan on a CPU: vectors of channels, tiles of tokens, states kept at tile boundaries only.
//
// Every vector lane is a channel, so a token's states are N vectors and no sum crosses lanes until a tile is done. The
// forward may keep the state before every tile; the backward walks the tiles from the right, runs each again from there
// with its decays and states in cache, and carries the adjoint state. Gradients of B and C are summed over channels as
// vectors first. A state that entered after the forward was done is read out by `enter`, and the backward adds to the
// kept states what is left of it there. Equations: portable.py, stages.py.

#include "scan.h"

namespace {

template <class T> void forward(const Arguments &in) {
  const FlushSubnormals flush;
  const int64_t N = in.states, blocks = in.last_block - in.first_block;
  Buffer<T> state(blocks * N), rate(blocks * N), steps(in.tile);
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
        block.steps(first, last, steps.at(0));
        Vector<T> sum = {};
        for (int64_t t = first; t < last; ++t) {
          const Vector<T> step = *steps.at(t - first), u = block.u(t), input = step * u;
          sum += step;
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
        if (in.sums) store(static_cast<T *>(in.sums) + block.of_tile(first / in.tile), sum, block.lanes);
      }
    }
    for (int64_t i = 0; i < blocks; ++i)
      Block<T>(in, b, in.first_block + i).scatter(state.at(i * N), in.final_state, true);
  }
}

// What `follow` works with.
template <class T> struct Following {
  Buffer<T> rate, steps;
  std::vector<int64_t> which;
  explicit Following(const Arguments &in) : rate(in.states), steps(in.tile), which(in.states) {}
};

// Follow states that enter a block of channels for as long as they live, token by token: use(token, decayed states, the
// number of those that live, which they are), and done(the same without the token) behind every tile.
template <class T, class Use, class Done>
void follow(const Block<T> &block, Vector<T> *h, Following<T> &room, Use use, Done done) {
  const Arguments &in = block.in;
  const int64_t stop = block.reach();
  int64_t living = in.states, *which = room.which.data();
  Vector<T> *A = room.rate.at(0);
  block.gather(in.A, false, A);
  for (int64_t n = 0; n < living; ++n) A[n] *= T(log2_e), which[n] = n;
  for (int64_t first = 0; first < stop; first += in.tile) {
    const int64_t last = first + in.tile < stop ? first + in.tile : stop, before = living;
    const Vector<T> sum = block.before(first / in.tile);
    living = 0;
    for (int64_t k = 0; k < before; ++k)
      if (lives<T>(A[k] * sum, block.lanes)) h[living] = h[k], A[living] = A[k], which[living++] = which[k];
    if (!living) return;
    block.steps(first, last, room.steps.at(0));
    for (int64_t t = first; t < last; ++t) {
      const Vector<T> step = *room.steps.at(t - first);
      for (int64_t k = 0; k < living; ++k) h[k] *= exp2<T>(step * A[k]);
      use(t, h, living, which);
    }
    done(living, which);
  }
}

// Add to the outputs, in place, what the entering states give them.
template <class T> void enter(const Arguments &in) {
  const FlushSubnormals flush;
  Buffer<T> state(in.states);
  Following<T> room(in);
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t i = in.first_block; i < in.last_block; ++i) {
      const Block<T> block(in, b, i);
      block.gather(in.entering, true, state.at(0));
      const auto read = [&](int64_t t, const Vector<T> *h, int64_t living, const int64_t *n) {
        T *to = static_cast<T *>(in.y) + block.dense(t);
        const T *C = block.C(t);
        Vector<T> y = load(to, block.lanes);
        for (int64_t k = 0; k < living; ++k) y += h[k] * C[n[k]];
        store(to, y, block.lanes);
      };
      follow<T>(block, state.at(0), room, read, [](int64_t, const int64_t *) {});
    }
}

// Gradients of the entering states: sums over tokens of outputs' gradients, each tile's by itself first.
template <class T> void enter_backward(const Arguments &in) {
  const FlushSubnormals flush;
  Buffer<T> decay(in.states), total(in.states), part(in.states);
  Following<T> room(in);
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t i = in.first_block; i < in.last_block; ++i) {
      const Block<T> block(in, b, i);
      for (int64_t n = 0; n < in.states; ++n) *decay.at(n) = Vector<T>{} + T(1), *total.at(n) = Vector<T>{};
      const auto gather = [&](int64_t t, const Vector<T> *left, int64_t living, const int64_t *n) {
        const Vector<T> grad = block.row(in.grad_y, in.grad_y_batch, in.grad_y_token, t);
        const T *C = block.C(t);
        for (int64_t k = 0; k < living; ++k) *part.at(k) += left[k] * (grad * C[n[k]]);
      };
      const auto add = [&](int64_t living, const int64_t *n) {
        for (int64_t k = 0; k < living; ++k) *total.at(n[k]) += *part.at(k), *part.at(k) = Vector<T>{};
      };
      follow<T>(block, decay.at(0), room, gather, add);
      block.scatter(total.at(0), in.grad_entering, true);
    }
}

// The vectors a backward works with: of one tile, and of every block of channels.
template <class T> struct Scratch {
  Buffer<T> decays, states, steps, slopes, grads, B, C;  // of a tile
  Buffer<T> adjoint, rate, entering, rate_grad, D, bias;  // of the blocks
  std::vector<int64_t> living;                            // tiles of the blocks that the entering state reaches
  Scratch(int64_t tile, int64_t N, int64_t blocks)
      : decays(tile * N), states((tile + 1) * N), steps(tile), slopes(tile), grads(tile), B(tile * N), C(tile * N),
        adjoint(blocks * N), rate(blocks * N), entering(blocks * N), rate_grad(blocks * N), D(blocks), bias(blocks),
        living(blocks) {}
};

// Run a tile again from its checkpoint; gradients before the gate, and the gate's own.
template <class T> void recompute(const Block<T> &block, Scratch<T> &s, int64_t i, int64_t first, int64_t last) {
  const Arguments &in = block.in;
  const int64_t N = in.states;
  const Vector<T> *A = s.rate.at(i * N);
  std::memcpy(s.states.at(0), block.checkpoint(first / in.tile), N * 64);
  if (first / in.tile < s.living[i]) {
    const Vector<T> sum = block.before(first / in.tile);
    for (int64_t n = 0; n < N; ++n)
      if (lives<T>(A[n] * sum, block.lanes)) *s.states.at(n) += exp2<T>(A[n] * sum) * *s.entering.at(i * N + n);
  }
  block.steps(first, last, s.steps.at(0), s.slopes.at(0));
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = t - first;
    const Vector<T> step = *s.steps.at(row), u = block.u(t), input = step * u;
    const T *B = block.B(t), *C = block.C(t);
    const Vector<T> *before = s.states.at(row * N);
    Vector<T> *now = s.states.at((row + 1) * N), *decay = s.decays.at(row * N);
    const T keep = block.starts(t) ? T(0) : T(1);
    for (int64_t n = 0; n < N; ++n) {
      decay[n] = exp2<T>(step * A[n]) * keep;
      now[n] = decay[n] * before[n] + input * B[n];
    }
    Vector<T> grad = block.row(in.grad_y, in.grad_y_batch, in.grad_y_token, t);
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
    if (in.softplus) step_grad *= *s.slopes.at(row);
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
    for (int64_t i = 0; i < blocks; ++i) {
      const Block<T> block(in, b, in.first_block + i);
      block.gather(in.grad_final, true, s.adjoint.at(i * N));
      if (!in.entering) continue;
      block.gather(in.entering, true, s.entering.at(i * N));
      s.living[i] = living_tiles(block, s.rate.at(i * N));
    }
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
void scan_enter_float32(const Arguments *in) { enter<float>(*in); }
void scan_enter_float64(const Arguments *in) { enter<double>(*in); }
void scan_enter_backward_float32(const Arguments *in) { enter_backward<float>(*in); }
void scan_enter_backward_float64(const Arguments *in) { enter_backward<double>(*in); }
void scan_forward_float32(const Arguments *in) { forward<float>(*in); }
void scan_forward_float64(const Arguments *in) { forward<double>(*in); }
void scan_backward_float32(const Arguments *in) { backward<float>(*in); }
void scan_backward_float64(const Arguments *in) { backward<double>(*in); }
}
