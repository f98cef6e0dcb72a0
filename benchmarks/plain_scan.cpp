// The selective scan as a plain loop, channel by channel, with all states of one channel kept: what compiled code costs
// without any design. The yardstick of the compiled scan in kernels_cpu.py.
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

static void channels(int64_t first, int64_t last, int64_t T, int64_t D, int64_t N, const float* u, const float* delta,
                     const float* A, const float* B, const float* C, const float* dy, float* y, float* du, float* ds,
                     float* dA, float* dB, float* dC) {
    std::vector<float> states((T + 1) * N), decays(T * N), adjoint(N);
    for (int64_t d = first; d < last; ++d) {
        for (int64_t n = 0; n < N; ++n) states[n] = 0.0f;
        for (int64_t t = 0; t < T; ++t) {
            const float step = delta[t * D + d], in = step * u[t * D + d];
            const float *h = &states[t * N], *b = B + t * N, *c = C + t * N, *a = A + d * N;
            float *next = &states[(t + 1) * N], *decay = &decays[t * N], out = 0.0f;
            for (int64_t n = 0; n < N; ++n) {
                decay[n] = std::exp(step * a[n]);
                next[n] = decay[n] * h[n] + in * b[n];
                out += next[n] * c[n];
            }
            y[t * D + d] = out;
        }
        for (int64_t n = 0; n < N; ++n) adjoint[n] = 0.0f;
        for (int64_t t = T - 1; t >= 0; --t) {
            const float step = delta[t * D + d], x = u[t * D + d], g = dy[t * D + d];
            const float *h = &states[t * N], *next = &states[(t + 1) * N], *decay = &decays[t * N];
            const float *b = B + t * N, *c = C + t * N, *a = A + d * N;
            float input = 0.0f, rate = 0.0f;
            for (int64_t n = 0; n < N; ++n) {
                const float grad = adjoint[n] + c[n] * g;
                dC[t * N + n] += next[n] * g;
                dB[t * N + n] += grad * step * x;
                input += grad * b[n];
                adjoint[n] = grad * decay[n];
                const float moment = adjoint[n] * h[n];
                rate += moment * a[n];
                dA[d * N + n] += moment * step;
            }
            du[t * D + d] = step * input;
            ds[t * D + d] = x * input + rate;
        }
    }
}

extern "C" void plain_scan(int64_t threads, int64_t T, int64_t D, int64_t N, const float* u, const float* delta,
                           const float* A, const float* B, const float* C, const float* dy, float* y, float* du,
                           float* ds, float* dA, float* dB, float* dC) {
    std::vector<std::vector<float>> partial(threads, std::vector<float>(2 * T * N, 0.0f));
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < threads; ++i)
        pool.emplace_back(channels, D * i / threads, D * (i + 1) / threads, T, D, N, u, delta, A, B, C, dy, y, du, ds,
                          dA, partial[i].data(), partial[i].data() + T * N);
    for (auto& worker : pool) worker.join();
    for (auto& part : partial)
        for (int64_t i = 0; i < T * N; ++i) dB[i] += part[i], dC[i] += part[T * N + i];
}
