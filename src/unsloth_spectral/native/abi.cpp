// The compiler's layout of the structures in abi.h, for native/abi.py to compare with its own.
#include "abi.h"

#include <cstddef>
#include <vector>

namespace spectral {

// A field; a whole structure, with an empty `field`; or a constant, with an empty `structure` and its value as `size`.
struct LayoutEntry {
    const char* structure;
    const char* field;
    int64_t offset, size;
};

// The table ends with an entry whose names are null.
extern "C" const LayoutEntry* spectral_layout() {
    static const std::vector<LayoutEntry> entries = [] {
        std::vector<LayoutEntry> all = {
            {"", "MAX_SMOOTH", 0, MAX_SMOOTH}, {"", "FULL_WAVE", 0, static_cast<int64_t>(FULL_WAVE)},
            {"", "FLOAT32", 0, FLOAT32},       {"", "BFLOAT16", 0, BFLOAT16},
            {"", "FLOAT16", 0, FLOAT16},
        };
#define FIELD_ENTRY(type, name) {structure, #name, offsetof(Structure, name), sizeof(Structure::name)},
#define STRUCTURE_ENTRIES(Name, FIELDS)                                                                 \
    {                                                                                                   \
        using Structure = Name;                                                                         \
        constexpr const char* structure = #Name;                                                        \
        all.insert(all.end(), {{structure, "", 0, sizeof(Structure)}, FIELDS(FIELD_ENTRY)});            \
    }
        STRUCTURES(STRUCTURE_ENTRIES)
#undef STRUCTURE_ENTRIES
#undef FIELD_ENTRY
        all.push_back({nullptr, nullptr, 0, 0});
        return all;
    }();
    return entries.data();
}

}  // namespace spectral
