// The kernels of training, in terms of V: 16 floats. Included once by each train_*.cpp after its vector header, inside
// that file's namespace; so, as in producers.hpp, nothing here may use the standard library's templates.

#include "train_access.hpp"
#include "train_pack.hpp"
#include "train_depthwise.hpp"
#include "train_norm.hpp"
#include "train_pool.hpp"
#include "train_windows.hpp"
#include "train_outer.hpp"

template <class S, class T, class Dot>
constexpr TrainKernels train_table() {
  return {
      .pack = pack<T>,
      .pack_transposed = pack_transposed<T>,
      .fill = fill<S>,
      .filter = filter_rows<T>,
      .filter_back = filter_back<S>,
      .statistics = statistics<S>,
      .finish = finish<S>,
      .gradient_sums = gradient_sums<S>,
      .gradient = gradient<S, T>,
      .pool = pool<S>,
      .pool_back = pool_back<S>,
      .windows = windows<S, T>,
      .readers = readers,
      .spread = spread<S>,
      .outer = outer<Dot>,
      .left_pairs = pairs,
      .right_pairs = pairs,
      .step_unit = 1,
  };
}
