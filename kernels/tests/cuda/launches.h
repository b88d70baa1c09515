// The kernels as plain functions, for the test to call. Compiled after the text.

struct Launch {
    unsigned x, y, z, threads, backwards;
};

static void launch(const Launch &how, std::function<void()> kernel) {
    processor::launch({how.x, how.y, how.z}, how.threads, how.backwards != 0, std::move(kernel));
}

extern "C" void run_scatter(Launch how, const u8 *from, u64 row_bytes, const u32 *places, u32 tokens, u8 *cells, u64 slot_bytes) {
    launch(how, [=] { scatter(from, row_bytes, places, tokens, cells, slot_bytes); });
}

extern "C" void run_gather(Launch how, const u8 *cells, u64 slot_bytes, const u32 *table, u32 tokens, u8 *to) {
    launch(how, [=] { gather(cells, slot_bytes, table, tokens, to); });
}

extern "C" void run_spill(Launch how, const u8 *cells, u8 *host, u64 slot_bytes, const u32 *spans, u32 count) {
    launch(how, [=] { spill(cells, host, slot_bytes, spans, count); });
}

#ifdef ATTENDS
extern "C" void run_attend(Launch how, const float *queries, const u8 *cells, u64 slot_bytes, const u32 *tables, u32 table_len,
                           const u32 *contexts, float scale, float *parts) {
    launch(how, [=] { attend(queries, cells, slot_bytes, tables, table_len, contexts, scale, parts); });
}

extern "C" void run_merge(Launch how, const float *parts, u32 parts_max, const u32 *contexts, ELEMENT *out) {
    launch(how, [=] { merge(parts, parts_max, contexts, out); });
}
#endif
