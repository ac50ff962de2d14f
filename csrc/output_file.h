// Writing an output file whole, as runtime/output.py does.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace goslet {

// Writes the pieces one after another. The file appears under its name complete or not at all: it is written under a
// hidden name in the same folder, synced to the disk and renamed. An existing file is replaced and keeps its permission
// bits; a symbolic link stays and what it points to is replaced. Throws ContainerError (kUnwritable) and leaves what
// was there.
void write_whole(const std::string& path, const std::vector<std::string_view>& pieces);

}  // namespace goslet
