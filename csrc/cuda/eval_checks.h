// What the launch functions of convolutions and evaluation blocks require, and the grid of tiles over images.
#pragma once
#include <stdexcept>
#include <string>

#include "vec.cuh"

namespace FASTRES_BACKEND {

constexpr i64 kMaxSize = 1 << 20;  // of N, H, W and channels
constexpr i64 kMaxTiles = 1 << 30;

// Throws std::invalid_argument naming the function.
struct Require {
    const char* name;

    void operator()(bool fits, const std::string& what, i64 got) const {
        if (!fits) throw std::invalid_argument(std::string(name) + ": " + what + ", got " + std::to_string(got));
    }
    void half(int dtype) const {
        (*this)(dtype == kBF16 || dtype == kF16, "dtype code is 1 (bfloat16) or 2 (float16)", dtype);
    }
    void images(i64 N, i64 H, i64 W) const {
        (*this)(N >= 0 && N < kMaxSize, "N is 0..2^20", N);
        (*this)(H >= 0 && H < kMaxSize, "H is 0..2^20", H);
        (*this)(W >= 0 && W < kMaxSize, "W is 0..2^20", W);
    }
    void channels(const char* what, i64 n) const {
        (*this)(n > 0 && n % 64 == 0 && n < kMaxSize, std::string(what) + " is a multiple of 64", n);
    }
    void aligned(const char* what, const void* p) const {
        (*this)(aligned16(p), std::string(what) + " is aligned to 16 bytes", reinterpret_cast<i64>(p));
    }
};

// Sizes of the images and of the grid over them; `channels`: the most that a pixel has.
template <class Shape>
void tile_images(const Require& require, Shape& s, i64 N, i64 H, i64 W, i64 channels, i64 tile_h, i64 tile_w) {
    s.H = static_cast<int>(H);
    s.W = static_cast<int>(W);
    s.tiles_h = static_cast<int>(ceil_div(H, tile_h));
    s.tiles_w = static_cast<int>(ceil_div(W, tile_w));
    const i64 tiles = N * s.tiles_h * s.tiles_w;
    const std::string size = std::to_string(tile_h) + " x " + std::to_string(tile_w);
    require(tiles < kMaxTiles, "there are fewer than 2^30 tiles of " + size + " pixels", tiles);
    require(H * W * channels < (i64{1} << 31), "an image has fewer than 2^31 elements", H * W * channels);
    s.tiles = static_cast<int>(tiles);
}

// f(T()) with the 16-bit type of a dtype code that `half` has let pass.
template <class F>
void with_half(int dtype, const F& f) {
    if (dtype == kBF16)
        f(bf16{});
    else
        f(f16{});
}

}  // namespace FASTRES_BACKEND
