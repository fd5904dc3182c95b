// out = a + g with g the masked gradient: the residual branch's gradient joins the main one.
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {

void mask_add(int dtype, const void* a, const void* grad, const u8* mask, i64 M, i64 C, void* out, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        const T* main = static_cast<const T*>(a);
        const T* side = static_cast<const T*>(grad);
        T* sum = static_cast<T*>(out);
        const i64 pitch = mask_bytes(C);
        parallel_rows(M, C, ctx, [=](i64 m0, i64 m1) {
            walk(m0, m1, 0, C, C, [=](auto rows, i64 m, i64 c, auto s) __attribute__((always_inline)) {
                for (int u = 0; u < rows.value; ++u) {
                    const i64 at = (m + u) * C + c;
                    const u32 bits = s.bits(mask + (m + u) * pitch + c / 8);
                    s.store(sum + at, s.load(main + at) + keep(s.load(side + at), bits));
                }
            });
        });
    });
}

}  // namespace FASTRES_BACKEND
