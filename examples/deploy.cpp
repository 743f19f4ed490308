// Runs a compiled module from C++: token ids in, numbers out. No Python at run time.
//
// Build (needs a C++17 compiler and the headers of the package apache-tvm-ffi):
//
//   g++ -O2 $(python -m tvm_ffi.config --cxxflags) deploy.cpp -o deploy
//       $(python -m tvm_ffi.config --ldflags --libs) -Wl,-rpath,$(python -m tvm_ffi.config --libdir) -ldl    (one line)
//
// or `make deploy`. To run it elsewhere copy deploy, model.so, libtvm_runtime.so (from the folder tvm/lib of an
// installed apache-tvm) and libtvm_ffi.so (from --libdir); set LD_LIBRARY_PATH to their folder.
//
//   ./deploy model.so ./libtvm_runtime.so 101 7592 2088 102
//
// prints one line per request (embeddings, classes) or one per token. TVM_NUM_THREADS sets the number of threads. Of a
// module with code for several instruction sets it runs the fastest that the CPU has.

#include <dlfcn.h>
#include <sys/syscall.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

constexpr int64_t kTile = 16;  // tokens in a tile
constexpr DLDevice kCPU{kDLCPU, 0};

// A tensor over memory that someone else owns and that outlives it. Compiled code wants it 64-byte aligned.
struct View {
  void* data;
  void AllocData(DLTensor* tensor) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

ffi::Tensor MakeView(void* data, const std::vector<int64_t>& shape, DLDataType dtype) {
  return ffi::Tensor::FromNDAlloc(View{data}, ffi::ShapeView(shape.data(), shape.size()), dtype, kCPU);
}

// Values at a 64-byte boundary, zero at first.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::vector<int64_t> shape) : shape_(std::move(shape)), count_(1) {
    for (int64_t d : shape_) count_ *= d;
    data_ = static_cast<T*>(std::aligned_alloc(64, (count_ * sizeof(T) + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
    std::fill(data_, data_ + count_, T{0});
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T& operator[](int64_t i) { return data_[i]; }
  ffi::Tensor tensor() {
    const uint8_t code = std::is_floating_point_v<T> ? kDLFloat : std::is_signed_v<T> ? kDLInt : kDLUInt;
    return MakeView(data_, shape_, DLDataType{code, 8 * sizeof(T), 1});
  }

 private:
  std::vector<int64_t> shape_;
  int64_t count_;
  T* data_;
};

template <typename T>
T Get(const json::Object& object, const char* key) {
  return object.at(ffi::String(key)).cast<T>();
}

void* Open(const std::string& path, int flags) {
  void* handle = dlopen(path.c_str(), flags);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  return handle;
}

void* Symbol(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) throw std::runtime_error(std::string("not a Whet module: no symbol ") + name);
  return symbol;
}

std::set<std::string> CpuFlags() {
  std::ifstream info("/proc/cpuinfo");
  std::set<std::string> flags;
  for (std::string line; flags.empty() && std::getline(info, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) flags.insert(word);
  }
  return flags;
}

// Why this machine cannot run code that needs these flags; empty if it can.
std::string WhyNot(const json::Array& required) {
  static const std::set<std::string> flags = CpuFlags();
  for (const ffi::Any& value : required) {
    std::string flag = value.cast<ffi::String>();
    if (flags.count(flag) == 0) return "this CPU lacks " + flag;
    // Linux keeps the AMX tile registers from a process until it asks (arch_prctl, ARCH_REQ_XCOMP_PERM).
    if (flag == "amx_tile" && syscall(SYS_arch_prctl, 0x1023, 18) != 0) return "the kernel refuses the AMX registers";
  }
  return "";
}

// The process would die of an unknown instruction: choose first, as the Python runtime does. In a module with code for
// several instruction sets the list "variants", the fastest first, completes the metadata.
json::Object ChooseVariant(json::Object metadata) {
  const ffi::String list("variants");
  const json::Array variants = metadata.count(list) ? metadata.at(list).cast<json::Array>() : json::Array{json::Object()};
  std::string reasons;
  for (const ffi::Any& variant : variants) {
    json::Object chosen = metadata;
    for (const auto& [key, value] : variant.cast<json::Object>()) chosen.Set(key, value);
    const std::string reason = WhyNot(Get<json::Array>(chosen, "cpu_flags"));
    if (reason.empty()) return chosen;
    reasons += std::string(Get<ffi::String>(chosen, "isa")) + ": " + reason + "; ";
  }
  throw std::runtime_error(reasons + "compile the model for this machine");
}

int Run(const std::string& path, const std::string& runtime, const std::vector<int64_t>& ids) {
  setenv("TVM_BIND_THREADS", "0", 0);
  Open(runtime, RTLD_NOW | RTLD_GLOBAL);
  void* library = Open(path, RTLD_NOW | RTLD_LOCAL);

  const char* text = static_cast<const char*>(Symbol(library, "whet_metadata"));
  json::Object metadata = json::Parse(ffi::String(text)).cast<json::Object>();
  if (Get<int64_t>(metadata, "format") != 4) throw std::runtime_error("this program reads format 4 only");
  metadata = ChooseVariant(metadata);
  if (Get<ffi::String>(metadata, "convention") != "packed") throw std::runtime_error("only packed modules are handled");

  // Kernels do not check bounds.
  const int64_t count = static_cast<int64_t>(ids.size());
  const int64_t vocabulary = Get<int64_t>(metadata, "vocab_size");
  if (count > Get<int64_t>(metadata, "max_length")) throw std::runtime_error("too many tokens for this model");
  for (int64_t id : ids) {
    if (id < 0 || id >= vocabulary) throw std::runtime_error(std::to_string(id) + " is not in the vocabulary");
  }

  // One request: tokens in tiles of 16, and a group of 16 segments of which one is used.
  const int64_t tiles = (count + kTile - 1) / kTile;
  Buffer<int32_t> tokens({tiles, kTile}), positions({tiles, kTile}), types({tiles, kTile}), segments({1, kTile, 2});
  for (int64_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<int32_t>(ids[i]);
    positions[i] = static_cast<int32_t>(i);
  }
  segments[1] = static_cast<int32_t>(count);

  // Weights stay where they are: in the pages of the file. The scratch memory can serve any number of calls, one by one.
  const int64_t* size = static_cast<const int64_t*>(Symbol(library, "whet_weights_size"));
  ffi::Tensor weights = MakeView(Symbol(library, "whet_weights"), {*size}, DLDataType{kDLUInt, 8, 1});
  Buffer<uint8_t> workspace(
      {tiles * Get<int64_t>(metadata, "workspace_per_tile") + Get<int64_t>(metadata, "workspace_per_group") + 1});
  const json::Object output = Get<json::Object>(metadata, "output");
  const bool per_token = Get<ffi::String>(output, "per") == "token";
  const int64_t channels = Get<int64_t>(output, "channels");
  // A module with caches says after how many layers each request was answered, and how far that is to be trusted.
  const int64_t written = channels + (Get<json::Array>(metadata, "exits").size() ? 2 : 0);
  Buffer<float> values({per_token ? tiles : 1, written, kTile});

  ffi::Function main = ffi::Module::LoadFromFile(path)->GetFunction(Get<ffi::String>(metadata, "entry")).value();
  main(tokens.tensor(), positions.tensor(), types.tensor(), segments.tensor(), weights, workspace.tensor(),
       values.tensor());

  // (tiles, channels, 16): column i is [i / 16][.][i % 16].
  for (int64_t i = 0; i < (per_token ? count : 1); ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      std::printf("%s%.9g", c ? " " : "", values[((i / kTile) * written + c) * kTile + i % kTile]);
    }
    std::printf("\n");
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s MODEL.so LIBTVM_RUNTIME.so ID [ID ...]\n", argv[0]);
    return 2;
  }
  try {
    std::vector<int64_t> ids;
    for (int i = 3; i < argc; ++i) {
      size_t used = 0;
      ids.push_back(std::stoll(argv[i], &used));
      if (argv[i][used] != '\0') throw std::runtime_error(std::string(argv[i]) + " is not a token id");
    }
    return Run(argv[1], argv[2], ids);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "deploy: %s\n", error.what());
    return 1;
  }
}
