#pragma once

#include <string_view>

namespace bitnet {

inline constexpr std::string_view kVersion = BITNET_VERSION;  // set by CMake

}  // namespace bitnet
