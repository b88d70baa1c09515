// Attention of single tokens over cells in the device's pool: the decode half of attention.
//
// Split over the context (Flash-Decoding, Dao et al. 2023): `attend` computes parts of a token's context, `merge` joins them. Online
// softmax (Milakov, Gimelshein 2018). How a context is cut follows from its own length, so a token's sums do not depend on what else
// is in the batch.
//
// A block of threads takes one part of one token, for one KV head and the query heads that share it, GROUP of them at most: a byte of K
// or V is read from memory once for those. Its threads are teams: a team takes every TEAMS-th token of the part, a lane of it 16
// bytes of the head (or EACH times that). So a key is read by one instruction of its team, queries and sums stay in registers, teams know
// nothing of one another until the end, and there is nothing to wait for in the loop.

constexpr int THREADS = 128;
// Query heads that share a KV head, and how many of them a block takes.
constexpr int SHARING = HEADS / KV_HEADS;
constexpr int GROUP = SHARING < 8 ? SHARING : 8;
constexpr int GROUPS = (SHARING + GROUP - 1) / GROUP;
// Vectors of a head, lanes of a team (a power of two, one warp at most), and vectors of a lane.
constexpr int VECTORS = HEAD_DIM / NUMBERS;
__device__ constexpr int lanes(int least) { return least >= VECTORS || least == 32 ? least : lanes(2 * least); }
constexpr int LANES = lanes(1);
constexpr int EACH = (VECTORS + LANES - 1) / LANES;
constexpr int TEAMS = THREADS / LANES;
// Tokens that a team has in flight.
constexpr int AHEAD = 4;
// Largest score of nothing: finite, so that a difference of two is a number.
constexpr float NOTHING = -1e30f;

// Numbers that a part leaves for each head: the weighted sum of values, the largest score, the sum of weights.
constexpr int LEFT = HEAD_DIM + 2;

// A team's keys or values of AHEAD tokens; nothing where a token or a vector is not there.
struct Ahead {
    Vector vector[AHEAD][EACH];
};

__device__ __forceinline__ Ahead load(const u8 *cells, u64 slot_bytes, const u32 *table, u32 run, u32 token, u32 end, int lane) {
    Ahead ahead;
#pragma unroll
    for (int i = 0; i < AHEAD; i++, token += TEAMS) {
        bool there = token < end;
        const Vector *from =
            (const Vector *)(cells + (there ? run_at(slot_bytes, table[token / BLOCK_TOKENS], run, token % BLOCK_TOKENS) : 0));
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            ahead.vector[i][j] = there && lane + j * LANES < VECTORS ? from[lane + j * LANES] : Vector{{0, 0, 0, 0}};
        }
    }
    return ahead;
}

// The sum over the lanes of a team, on each of them.
__device__ __forceinline__ float team_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// `queries`: [tokens][HEADS][HEAD_DIM]. `tables`: each token's slots, `table_len` of them. `contexts`: the first position that a token
// sees, the end of what it sees, and how many positions a part has. `parts`: [tokens][gridDim.y][HEADS][LEFT].
// The grid is (KV_HEADS * GROUPS, parts of the longest context, tokens).
extern "C" __global__ void __launch_bounds__(THREADS) attend(const float *queries, const u8 *cells, u64 slot_bytes, const u32 *tables,
                                                             u32 table_len, const u32 *contexts, float scale, float *parts) {
    int kv_head = blockIdx.x / GROUPS, head = kv_head * SHARING + blockIdx.x % GROUPS * GROUP;
    int heads = min(GROUP, (kv_head + 1) * SHARING - head);
    u32 single = blockIdx.z, end = contexts[3 * single + 1], length = contexts[3 * single + 2];
    u32 begin = contexts[3 * single] + blockIdx.y * length;
    if (begin >= end) return;
    end = min(end, begin + length);
    const u32 *table = tables + (u64)single * table_len;
    int lane = threadIdx.x % LANES, team = threadIdx.x / LANES;

    float query[GROUP][EACH][NUMBERS], sum[GROUP][EACH][NUMBERS] = {}, largest[GROUP], weight[GROUP] = {};
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        largest[h] = NOTHING;
        const float *from = queries + ((u64)single * HEADS + head + h) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int at = (lane + j * LANES) * NUMBERS;
#pragma unroll
            for (int i = 0; i < NUMBERS; i++) query[h][j][i] = h < heads && at < HEAD_DIM ? from[at + i] * scale : 0.0f;
        }
    }

    // All teams go around equally often: lanes of a warp sum together.
    for (u32 first = begin; first < end; first += TEAMS * AHEAD) {
        u32 token = first + team;
        Ahead keys = load(cells, slot_bytes, table, kv_head, token, end, lane);
        Ahead values = load(cells, slot_bytes, table, KV_HEADS + kv_head, token, end, lane);
        float score[GROUP][AHEAD] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                float key[NUMBERS];
                numbers(keys.vector[i][j], key);
#pragma unroll
                for (int h = 0; h < GROUP; h++) {
#pragma unroll
                    for (int n = 0; n < NUMBERS; n++) score[h][i] += query[h][j][n] * key[n];
                }
            }
        }
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            float now = largest[h];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                score[h][i] = team_sum(score[h][i]);
                now = token + i * TEAMS < end ? fmaxf(now, score[h][i]) : now;
            }
            float shrink = __expf(largest[h] - now);
            largest[h] = now;
            weight[h] *= shrink;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                score[h][i] = token + i * TEAMS < end ? __expf(score[h][i] - now) : 0.0f;
                weight[h] += score[h][i];
            }
#pragma unroll
            for (int j = 0; j < EACH; j++) {
#pragma unroll
                for (int n = 0; n < NUMBERS; n++) sum[h][j][n] *= shrink;
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                float value[NUMBERS];
                numbers(values.vector[i][j], value);
#pragma unroll
                for (int h = 0; h < GROUP; h++) {
#pragma unroll
                    for (int n = 0; n < NUMBERS; n++) sum[h][j][n] += score[h][i] * value[n];
                }
            }
        }
    }

    // The teams' sums, one head after the other.
    __shared__ float shared_sum[TEAMS][HEAD_DIM], shared_largest[TEAMS], shared_weight[TEAMS];
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        if (h >= heads) break;
        __syncthreads();
        if (lane == 0) {
            shared_largest[team] = largest[h];
            shared_weight[team] = weight[h];
        }
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int at = (lane + j * LANES) * NUMBERS;
#pragma unroll
            for (int n = 0; n < NUMBERS; n++) {
                if (at < HEAD_DIM) shared_sum[team][at + n] = sum[h][j][n];
            }
        }
        __syncthreads();
        float most = NOTHING, total = 0.0f;
        for (int t = 0; t < TEAMS; t++) most = fmaxf(most, shared_largest[t]);
        for (int t = 0; t < TEAMS; t++) total += shared_weight[t] * __expf(shared_largest[t] - most);
        float *left = parts + (((u64)single * gridDim.y + blockIdx.y) * HEADS + head + h) * LEFT;
        for (int at = threadIdx.x; at < HEAD_DIM; at += THREADS) {
            float x = 0.0f;
            for (int t = 0; t < TEAMS; t++) x += shared_sum[t][at] * __expf(shared_largest[t] - most);
            left[at] = x;
        }
        if (threadIdx.x == 0) {
            left[HEAD_DIM] = most;
            left[HEAD_DIM + 1] = total;
        }
    }
}

// `out`: [tokens][HEADS][HEAD_DIM]. The grid is (HEADS, tokens); `parts_max` was gridDim.y of `attend`.
extern "C" __global__ void merge(const float *parts, u32 parts_max, const u32 *contexts, ELEMENT *out) {
    u32 head = blockIdx.x, single = blockIdx.y;
    u32 length = contexts[3 * single + 2], count = (contexts[3 * single + 1] - contexts[3 * single] + length - 1) / length;
    const float *part = parts + ((u64)single * parts_max * HEADS + head) * LEFT;
    constexpr u64 STRIDE = (u64)HEADS * LEFT;
    float most = NOTHING, total = 0.0f;
    for (u32 p = 0; p < count; p++) most = fmaxf(most, part[p * STRIDE + HEAD_DIM]);
    for (u32 p = 0; p < count; p++) total += part[p * STRIDE + HEAD_DIM + 1] * __expf(part[p * STRIDE + HEAD_DIM] - most);
    for (int at = threadIdx.x; at < HEAD_DIM; at += blockDim.x) {
        float x = 0.0f;
        for (u32 p = 0; p < count; p++) x += part[p * STRIDE + at] * __expf(part[p * STRIDE + HEAD_DIM] - most);
        put(out + ((u64)single * HEADS + head) * HEAD_DIM + at, x / total);
    }
}
