#include "output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <random>

#include "container.h"

namespace goslet {
namespace {

constexpr int kMaxLinks = 40;
constexpr std::size_t kMaxNameBytes = 48;  // of the name within the hidden one, whose own length is limited too

[[noreturn]] void refuse(const std::string& problem) {
    throw ContainerError(ContainerError::Kind::kUnwritable, problem);
}

[[noreturn]] void refuse_error(int error) {
    switch (error) {
        case ENOSPC:
        case EDQUOT:
            refuse("the disk is full");
        case ENOENT:
            refuse("its folder does not exist");
        case ENOTDIR:
            refuse("its folder is a file");
        case EACCES:
        case EPERM:
        case EROFS:
            refuse("its folder cannot be written");
        default:
            refuse(std::string("cannot be written: ") + std::strerror(error));
    }
}

// With the slash, empty for the current folder.
std::string folder_of(const std::string& path) {
    return path.substr(0, path.rfind('/') + 1);
}

std::string link_target(const std::string& path) {
    char target[PATH_MAX];
    const ssize_t length = readlink(path.c_str(), target, sizeof target);
    if (length < 0) {
        refuse_error(errno);
    }
    if (length == sizeof target) {
        refuse_error(ENAMETOOLONG);
    }
    return {target, static_cast<std::size_t>(length)};
}

// The file that the last component of `path` leads to, which need not exist, and its permission bits if it does.
std::string real_file(std::string path, mode_t& mode, bool& exists) {
    if (path.empty() || path.back() == '/') {
        refuse("names no file");
    }
    for (int links = 0;; ++links) {
        struct stat status{};
        exists = lstat(path.c_str(), &status) == 0;
        if (!exists) {
            if (errno != ENOENT) {
                refuse_error(errno);
            }
            return path;
        }
        if (S_ISDIR(status.st_mode)) {
            refuse("is a folder");
        }
        if (!S_ISLNK(status.st_mode)) {
            if (!S_ISREG(status.st_mode)) {
                refuse("is not an ordinary file");
            }
            mode = status.st_mode & 0777;
            return path;
        }
        if (links == kMaxLinks) {
            refuse_error(ELOOP);
        }
        const std::string target = link_target(path);
        path = target.front() == '/' ? target : folder_of(path) + target;
    }
}

std::string hidden_name(const std::string& path) {
    const std::string folder = folder_of(path);
    std::string name = path.substr(folder.size());
    if (name.size() > kMaxNameBytes) {
        std::size_t end = kMaxNameBytes;
        // Not within a character: some file systems refuse names that are not UTF-8.
        while (end > 0 && (static_cast<unsigned char>(name[end]) & 0xC0) == 0x80) {
            --end;
        }
        name.resize(end);
    }
    std::random_device random;
    char digits[17];
    std::snprintf(digits, sizeof digits, "%08x%08x", random(), random());
    return folder + "." + name + "." + digits + ".tmp";
}

// The hidden file; closed and removed unless `publish` has renamed it.
class HiddenFile {
  public:
    explicit HiddenFile(std::string path)
        : path_(std::move(path)), descriptor_(open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
        if (descriptor_ < 0) {
            refuse_error(errno);
        }
    }
    ~HiddenFile() {
        if (descriptor_ >= 0) {
            close(descriptor_);
        }
        if (!path_.empty()) {
            unlink(path_.c_str());
        }
    }
    HiddenFile(const HiddenFile&) = delete;
    HiddenFile& operator=(const HiddenFile&) = delete;

    void allow(mode_t mode) {
        if (fchmod(descriptor_, mode) != 0) {
            refuse_error(errno);
        }
    }

    void write(std::string_view bytes) {
        while (!bytes.empty()) {
            const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
            if (written < 0 && errno != EINTR) {
                refuse_error(errno);
            }
            bytes.remove_prefix(written < 0 ? 0 : static_cast<std::size_t>(written));
        }
    }

    void publish(const std::string& target) {
        while (fsync(descriptor_) != 0) {
            if (errno != EINTR) {
                refuse_error(errno);
            }
        }
        const int descriptor = descriptor_;
        descriptor_ = -1;
        if (close(descriptor) != 0 && errno != EINTR) {
            refuse_error(errno);
        }
        if (rename(path_.c_str(), target.c_str()) != 0) {
            refuse_error(errno);
        }
        path_.clear();
    }

  private:
    std::string path_;
    int descriptor_;
};

}  // namespace

void write_whole(const std::string& path, const std::vector<std::string_view>& pieces) {
    mode_t mode = 0;
    bool exists = false;
    const std::string target = real_file(path, mode, exists);
    const std::string folder = folder_of(target).empty() ? "." : folder_of(target);
    HiddenFile file(hidden_name(target));
    if (exists) {
        file.allow(mode);
    }
    for (const std::string_view piece : pieces) {
        file.write(piece);
    }
    file.publish(target);
    // The new name is durable only once its folder is; a file system that cannot sync folders still has the file.
    const int descriptor = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor >= 0) {
        (void)fsync(descriptor);
        close(descriptor);
    }
}

}  // namespace goslet
