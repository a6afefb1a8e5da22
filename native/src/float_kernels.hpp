// The kernels whose products are of floats, whatever the activations' type. Included like producers.hpp, after
// multiply.hpp: one table for each type of activations.

template <class S>
constexpr Kernels float_kernels(Type type) {
  return {
      .type = type,
      .matrix_type = Type::f32,
      .depth_unit = 1,
      .depthwise = depthwise<S, float>,
      .filter = filter<S>,
      .patches = patches<S, float>,
      .image = image_patches<float>,
      .load = load_blocks<S>,
      .unload = unload_blocks<S>,
      .pool = max_pool<S>,
      .reduce = reduce<S>,
      .multiply = multiply<DotFloat, S>,
      .multiply_f32 = multiply<DotFloat, float>,
      .depthwise_u8 = depthwise<S, u8>,
      .patches_u8 = patches_u8<S>,
      .multiply_u8 = multiply<DotBytes, S>,
      .begin_thread = nullptr,
      .end_thread = nullptr,
  };
}

inline const Kernels* float_tables(Type type) {
  static constexpr Kernels tables[] = {float_kernels<float>(Type::f32), float_kernels<bf16>(Type::bf16),
                                       float_kernels<f16>(Type::f16)};
  return &tables[static_cast<int>(type)];
}
