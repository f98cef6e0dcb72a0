// RWKV-4's recurrence on a CPU: vectors of channels, states kept at the boundaries of tiles of tokens only.
//
// A state is a e^p over b e^p, with p the largest exponent so far. Without `y` only the state is wanted, and `bonus` and
// `grad_y` are not read. The backward walks the tiles from the right, runs each again and carries the adjoint of a and b
// with p held constant, because only a e^p and b e^p matter; what is left for the last p belongs to the key that set it,
// or to the entering p, and to every decay on the way. Equations: reference.py; gradients: portable.py.

#include "../vectors.h"

extern "C" struct Arguments {  // the order of compiled.py's
  const void *k, *v, *decay, *bonus, *initial;
  const uint8_t *starts;
  void *y, *final_state, *checkpoints;
  const void *grad_y, *grad_final;
  void *grad_k, *grad_v, *grad_decay, *grad_bonus, *grad_initial;
  int64_t batch, length, channels, tile;
  int64_t first_block, last_block;  // of channels, in vectors
  int64_t k_batch, k_token, v_batch, v_token, starts_batch;
};

namespace {

template <class T> struct State {
  Vector<T> a, b, p;
};

// e^x for x <= 0.
template <class T> inline Vector<T> decayed(Vector<T> x) { return exp2<T>(x * T(log2_e)); }

// Weights e^(one - largest) and e^(other - largest) of two exponents.
template <class T> struct Weights {
  Vector<T> largest, one, other;
  Weights(Vector<T> first, Vector<T> second) {
    const auto above = first > second;
    const Vector<T> smaller = decayed<T>(above ? second - first : first - second), unit = Vector<T>{} + T(1);
    largest = above ? first : second;
    one = above ? unit : smaller;
    other = above ? smaller : unit;
  }
};

template <class T> struct Block : Rows<T, Arguments> {
  using Rows<T, Arguments>::Rows, Rows<T, Arguments>::in, Rows<T, Arguments>::b, Rows<T, Arguments>::channel;
  using Rows<T, Arguments>::lanes, Rows<T, Arguments>::row, Rows<T, Arguments>::dense;
  Vector<T> k(int64_t t) const { return row(in.k, in.k_batch, in.k_token, t); }
  Vector<T> v(int64_t t) const { return row(in.v, in.v_batch, in.v_token, t); }
  void write(void *base, int64_t t, Vector<T> x) const { store(static_cast<T *>(base) + dense(t), x, lanes); }
  // (B, D, 3) to vectors of channels and back; lanes of no channel hold a state of nothing
  State<T> gather(const void *base) const {
    State<T> state{{}, {}, Vector<T>{} + T(-1e38)};
    const T *from = static_cast<const T *>(base) + (b * in.channels + channel) * 3;
    for (int lane = 0; lane < lanes; ++lane) {
      state.a[lane] = from[3 * lane];
      state.b[lane] = from[3 * lane + 1];
      state.p[lane] = from[3 * lane + 2];
    }
    return state;
  }
  void scatter(const State<T> &state, void *base) const {
    T *to = static_cast<T *>(base) + (b * in.channels + channel) * 3;
    for (int lane = 0; lane < lanes; ++lane) {
      to[3 * lane] = state.a[lane];
      to[3 * lane + 1] = state.b[lane];
      to[3 * lane + 2] = state.p[lane];
    }
  }
  T *checkpoint(int64_t tile) const { return this->kept(tile, 3); }
};

template <class T> inline void forget(State<T> &state) { state = State<T>{{}, {}, Vector<T>{} + T(-1e38)}; }

// One token's share in the state: what is left of the state before, and the key's weight.
template <class T> inline Weights<T> advance(State<T> &state, Vector<T> k, Vector<T> v, Vector<T> log_decay) {
  const Weights<T> weights(state.p + log_decay, k);
  state = State<T>{weights.one * state.a + weights.other * v, weights.one * state.b + weights.other, weights.largest};
  return weights;
}

// States of the blocks of channels, aligned for vectors.
template <class T> struct States {
  Buffer<T> memory;
  explicit States(int64_t blocks) : memory(3 * blocks) {}
  State<T> &at(int64_t i) { return *reinterpret_cast<State<T> *>(memory.at(3 * i)); }
};

template <class T> void forward(const Arguments &in) {
  const FlushSubnormals flush;
  const int64_t blocks = in.last_block - in.first_block;
  States<T> states(blocks);
  for (int64_t b = 0; b < in.batch; ++b) {
    for (int64_t i = 0; i < blocks; ++i) states.at(i) = Block<T>(in, b, in.first_block + i).gather(in.initial);
    for (int64_t first = 0; first < in.length; first += in.tile) {
      const int64_t last = first + in.tile < in.length ? first + in.tile : in.length;
      for (int64_t i = 0; i < blocks; ++i) {
        const Block<T> block(in, b, in.first_block + i);
        State<T> state = states.at(i);
        if (in.checkpoints) std::memcpy(block.checkpoint(first / in.tile), &state, sizeof state);
        const Vector<T> log_decay = block.parameter(in.decay);
        for (int64_t t = first; t < last; ++t) {
          const Vector<T> k = block.k(t), v = block.v(t);
          if (block.starts(t)) forget(state);
          if (in.y) {
            const Weights<T> weights(state.p, block.parameter(in.bonus) + k);
            const Vector<T> numerator = weights.one * state.a + weights.other * v;
            block.write(in.y, t, numerator / (weights.one * state.b + weights.other));
          }
          advance(state, k, v, log_decay);
        }
        states.at(i) = state;
      }
    }
    for (int64_t i = 0; i < blocks; ++i) Block<T>(in, b, in.first_block + i).scatter(states.at(i), in.final_state);
  }
}

// What the backward needs of a token: the state before it, its exponent after the decay, and all weights.
template <class T> struct Row {
  Vector<T> a, b, exponent, decay, weight, past, now, y, reciprocal;
};

// The adjoints of a block of channels, and its sums over tokens.
template <class T> struct Adjoint {
  Vector<T> a, b, excess, log_decay, bonus;
};

// Run a tile again from its checkpoint.
template <class T> void recompute(const Block<T> &block, Row<T> *rows, int64_t first, int64_t last) {
  const Arguments &in = block.in;
  State<T> state;
  std::memcpy(&state, block.checkpoint(first / in.tile), sizeof state);
  const Vector<T> log_decay = block.parameter(in.decay);
  for (int64_t t = first; t < last; ++t) {
    Row<T> &row = rows[t - first];
    const Vector<T> k = block.k(t), v = block.v(t);
    if (block.starts(t)) forget(state);
    row.a = state.a, row.b = state.b, row.exponent = state.p + log_decay;
    if (in.grad_y) {
      const Weights<T> weights(state.p, block.parameter(in.bonus) + k);
      row.past = weights.one, row.now = weights.other;
      row.reciprocal = T(1) / (row.past * state.b + row.now);
      row.y = (row.past * state.a + row.now * v) * row.reciprocal;
    }
    const Weights<T> weights = advance(state, k, v, log_decay);
    row.decay = weights.one, row.weight = weights.other;
  }
}

// Walk a tile from the right and fill its gradients.
template <class T> void walk_back(const Block<T> &block, const Row<T> *rows, Adjoint<T> &sum, int64_t first, int64_t last) {
  const Arguments &in = block.in;
  Vector<T> log_decay = {}, bonus = {};  // of the tile first: one sum over all tokens would round more
  for (int64_t t = last - 1; t >= first; --t) {
    const Row<T> &row = rows[t - first];
    const Vector<T> k = block.k(t), v = block.v(t);
    const auto sets = k >= row.exponent;
    Vector<T> key = row.weight * (v * sum.a + sum.b) + (sets ? sum.excess : Vector<T>{});
    Vector<T> value = row.weight * sum.a;
    sum.excess = sets ? Vector<T>{} : sum.excess;
    log_decay += row.decay * (row.a * sum.a + row.b * sum.b) + sum.excess;
    sum.a *= row.decay;
    sum.b *= row.decay;
    if (in.grad_y) {
      const Vector<T> grad = load(static_cast<const T *>(in.grad_y) + block.dense(t), block.lanes);
      const Vector<T> numerator = grad * row.reciprocal, denominator = -numerator * row.y;
      const Vector<T> own = row.now * (numerator * v + denominator);
      key += own;
      value += row.now * numerator;
      bonus += own;
      sum.a += row.past * numerator;
      sum.b += row.past * denominator;
    }
    block.write(in.grad_k, t, key);
    block.write(in.grad_v, t, value);
  }
  sum.log_decay += log_decay;
  sum.bonus += bonus;
}

template <class T> void backward(const Arguments &in) {
  const FlushSubnormals flush;
  const int64_t blocks = in.last_block - in.first_block;
  Buffer<T> row_memory(in.tile * (sizeof(Row<T>) / 64)), sum_memory(blocks * (sizeof(Adjoint<T>) / 64));
  Row<T> *rows = reinterpret_cast<Row<T> *>(row_memory.data);
  Adjoint<T> *sums = reinterpret_cast<Adjoint<T> *>(sum_memory.data);
  for (int64_t b = 0; b < in.batch; ++b) {
    for (int64_t i = 0; i < blocks; ++i) {
      const Block<T> block(in, b, in.first_block + i);
      const State<T> last = block.gather(in.final_state), grad = block.gather(in.grad_final);
      sums[i].a = grad.a, sums[i].b = grad.b;
      sums[i].excess = grad.p - (grad.a * last.a + grad.b * last.b);
    }
    for (int64_t first = (in.length - 1) / in.tile * in.tile; first >= 0; first -= in.tile) {
      const int64_t last = first + in.tile < in.length ? first + in.tile : in.length;
      for (int64_t i = 0; i < blocks; ++i) {
        const Block<T> block(in, b, in.first_block + i);
        recompute(block, rows, first, last);
        walk_back(block, rows, sums[i], first, last);
      }
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const Block<T> block(in, b, in.first_block + i);
      const State<T> initial = block.gather(in.initial);
      const Vector<T> p = sums[i].a * initial.a + sums[i].b * initial.b + sums[i].excess;
      block.scatter(State<T>{sums[i].a, sums[i].b, p}, in.grad_initial);
    }
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const Block<T> block(in, 0, in.first_block + i);
    store(static_cast<T *>(in.grad_decay) + block.channel, sums[i].log_decay, block.lanes);
    if (in.grad_bonus) store(static_cast<T *>(in.grad_bonus) + block.channel, sums[i].bonus, block.lanes);
  }
}

}  // namespace

extern "C" {
void wkv4_forward_float32(const Arguments *in) { forward<float>(*in); }
void wkv4_forward_float64(const Arguments *in) { forward<double>(*in); }
void wkv4_backward_float32(const Arguments *in) { backward<float>(*in); }
void wkv4_backward_float64(const Arguments *in) { backward<double>(*in); }
}
