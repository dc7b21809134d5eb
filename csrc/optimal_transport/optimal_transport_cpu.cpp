// A work item is a sample. Its matrices are [texts, images], the longer side along the registers, and stay in
// the caches for all iterations, each of which passes over them once.
#include "optimal_transport/optimal_transport_cpu.h"

#include "primitives/cpu_matrix.h"

namespace vlk::VLK_ISA {
namespace {

constexpr float smallest_norm = 1e-5f;

// What a pair carries at least (MATH.md). It also spares the loops subnormal numbers, which are far slower.
constexpr float smallest_share = 1e-35f;

// The tokens of one side and sample over their norms, as floats. Rows have room for whole registers and begin
// in different cache sets, which widths of a power of two would not.
template <typename T>
class UnitRows {
  public:
    UnitRows(const TokenRows& tokens, int64_t width)
        : tokens_(tokens),
          width_(width),
          stride_(round_up(width, lanes) + lanes),
          unit_(tokens.longest * stride_),
          norms_(tokens.longest) {}

    void open(int64_t sample) {
        start_ = tokens_.starts[sample * tokens_.step];
        count_ = tokens_.lengths[sample * tokens_.step];
        for (int64_t row = 0; row < count_; ++row) {
            const T* from = static_cast<const T*>(tokens_.data) + (start_ + row) * width_;
            RowSum squares;
            for_chunks(width_, [&](int64_t column, auto chunk, int k) {
                const Floats value = load(from + column, chunk);
                squares.partial[k] += value * value;
            });
            const double norm = __builtin_sqrt(static_cast<double>(squares.total()));
            norms_.get()[row] = static_cast<float>(norm);
            const float factor = static_cast<float>(1 / (norm < smallest_norm ? smallest_norm : norm));
            for_chunks(width_, [&](int64_t column, auto chunk, int) {
                store(unit_.get() + row * stride_ + column, factor * load(from + column, chunk), Whole{});
            });
        }
    }

    // Writes the gradient of the tokens from `grad`, that of the unit rows, [count, stride].
    void differentiate(float factor, const float* grad, void* to) const {
        for (int64_t row = 0; row < count_; ++row, grad += stride_) {
            const float* unit = unit_.get() + row * stride_;
            const float norm = norms_.get()[row];
            const bool is_clamped = norm < smallest_norm;  // then the norm is a constant
            RowSum along, squares;  // the squares sum up to one, but for rounding, which would not cancel
            for_chunks(width_, [&](int64_t column, auto, int k) {
                const Floats value = load(unit + column, Whole{});
                along.partial[k] += value * load(grad + column, Whole{});
                squares.partial[k] += value * value;
            });
            const float by = factor / (is_clamped ? smallest_norm : norm);
            const float projection = is_clamped ? 0.0f : along.total() / squares.total();
            T* out = static_cast<T*>(to) + (start_ + row) * width_;
            for_chunks(width_, [&](int64_t column, auto chunk, int) {
                const Floats parallel = projection * load(unit + column, Whole{});
                store(out + column, by * (load(grad + column, Whole{}) - parallel), chunk);
            });
        }
    }

    void write_zeros(void* to) const {
        __builtin_memset(static_cast<T*>(to) + start_ * width_, 0, count_ * width_ * sizeof(T));
    }

    int64_t count() const { return count_; }
    int64_t stride() const { return stride_; }
    Rows rows() const { return {unit_.get(), stride_}; }
    const float* row(int64_t row) const { return unit_.get() + (row < count_ ? row : count_ - 1) * stride_; }

  private:
    const TokenRows& tokens_;
    const int64_t width_, stride_;
    int64_t start_ = 0, count_ = 0;
    Scratch<float> unit_, norms_;
};

// Cosines of a square block of pairs. Sums run down the lanes of registers, one per pair: as exact as sums of
// width / lanes terms.
constexpr int block = lanes == 16 ? 4 : 3;

template <typename T>
void cosines(const UnitRows<T>& texts, const UnitRows<T>& images, int64_t width, float* out, int64_t stride) {
    for (int64_t text = 0; text < texts.count(); text += block) {
        for (int64_t image = 0; image < images.count(); image += block) {
            const float *left[block], *right[block];
            for (int64_t i = 0; i < block; ++i) {
                left[i] = texts.row(text + i);
                right[i] = images.row(image + i);
            }
            Floats sum[block][block] = {};
            for (int64_t column = 0; column < width; column += lanes) {
                Floats factor[block];
#pragma GCC unroll 4
                for (int j = 0; j < block; ++j) factor[j] = load(right[j] + column, Whole{});
#pragma GCC unroll 4
                for (int i = 0; i < block; ++i) {
                    const Floats own = load(left[i] + column, Whole{});
#pragma GCC unroll 4
                    for (int j = 0; j < block; ++j) sum[i][j] += own * factor[j];
                }
            }
            for (int64_t i = 0; i < block && text + i < texts.count(); ++i) {
                for (int64_t j = 0; j < block && image + j < images.count(); ++j)
                    out[(text + i) * stride + image + j] = RowSum{{sum[i][j]}}.total();
            }
        }
    }
}

// The kernel K = exp(cosine / beta), W = K * plan, and the scales of the images, zero past the last one.
template <typename T>
class Forward {
  public:
    explicit Forward(const TransportForward& op)
        : op_(op),
          texts_(op.texts, op.width),
          images_(op.images, op.width),
          cosines_(op.texts.longest * round_up(op.images.longest, lanes)),
          kernel_(op.texts.longest * round_up(op.images.longest, lanes)),
          weighted_(op.texts.longest * round_up(op.images.longest, lanes)),
          sums_(op.images.longest),
          image_scale_(op.images.longest) {}

    void run(int64_t sample) {
        texts_.open(sample);
        images_.open(sample);
        columns_ = round_up(images_.count(), lanes);
        const bool is_empty = texts_.count() == 0 || images_.count() == 0;
        op_.distances[sample] = is_empty ? 0.0f : distance();
        if (op_.plans) write_plan(sample, is_empty ? 0 : texts_.count());
    }

  private:
    float distance() {
        cosines(texts_, images_, op_.width, cosines_.get(), columns_);
        begin();
        for (int64_t iteration = 1; iteration < op_.iterations; ++iteration) advance();
        return finish();
    }

    // exp(cosine / beta) is exp(-cost / beta) up to a factor that the scales take up, without a rounded cost.
    void begin() {
        const float steepness = 1 / op_.beta, text_scale = 1 / static_cast<float>(texts_.count());
        clear_sums();
        for (int64_t text = 0; text < texts_.count(); ++text) {
            const int64_t row = text * columns_;
            for_chunks(images_.count(), [&](int64_t image, auto chunk, int) {
                const Floats cosine = load(cosines_.get() + row + image, chunk);
                const Floats kernel = zero_past_end(exponential(steepness * cosine), chunk);
                store(cosines_.get() + row + image, cosine, Whole{});
                store(kernel_.get() + row + image, kernel, Whole{});
                store(weighted_.get() + row + image, kernel, Whole{});
                add_to_sums(image, text_scale * kernel);
            });
        }
        scale_images();
    }

    // One pass over the matrices: the rest of an iteration, and the beginning of the next one.
    void advance() {
        clear_sums();
        for (int64_t text = 0; text < texts_.count(); ++text) {
            const float* kernel = kernel_.get() + text * columns_;
            settle(text, [&](int64_t image, float* weighted, Floats plan, float text_scale, int) {
                const Floats share = plan < smallest_share ? Floats{} + smallest_share : plan;
                const Floats next = share * load(kernel + image, Whole{});
                store(weighted, next, Whole{});
                add_to_sums(image, text_scale * next);
            });
        }
        scale_images();
    }

    // The rest of the last iteration leaves the plan where W was.
    float finish() {
        RowSum sum;
        for (int64_t text = 0; text < texts_.count(); ++text) {
            const float* cosine = cosines_.get() + text * columns_;
            settle(text, [&](int64_t image, float* weighted, Floats plan, float, int k) {
                store(weighted, plan, Whole{});
                sum.partial[k] += plan * (1.0f - load(cosine + image, Whole{}));
            });
        }
        return sum.total();
    }

    // The scale of one text, 1 / (texts * sum of W over the images), and with it a row of the plan, in
    // registers: use(image, where they lie in W, plan, text scale, k).
    template <typename Use>
    void settle(int64_t text, const Use& use) {
        float* weighted = weighted_.get() + text * columns_;
        RowSum sum;
        for_chunks(columns_, [&](int64_t image, auto, int k) {
            sum.partial[k] += load(weighted + image, Whole{}) * load(image_scale_.get() + image, Whole{});
        });
        const float text_scale = 1 / (static_cast<float>(texts_.count()) * sum.total());
        for_chunks(columns_, [&](int64_t image, auto, int k) {
            const Floats scale = load(image_scale_.get() + image, Whole{});
            use(image, weighted + image, scale * load(weighted + image, Whole{}) * text_scale, text_scale, k);
        });
    }

    void clear_sums() { __builtin_memset(sums_.get(), 0, columns_ * sizeof(float)); }

    void add_to_sums(int64_t image, Floats value) {
        store(sums_.get() + image, load(sums_.get() + image, Whole{}) + value, Whole{});
    }

    void scale_images() {
        const float images = static_cast<float>(images_.count());
        for_chunks(images_.count(), [&](int64_t image, auto chunk, int) {
            const Floats scale = 1.0f / (images * load(sums_.get() + image, Whole{}));
            store(image_scale_.get() + image, zero_past_end(scale, chunk), Whole{});
        });
    }

    void write_plan(int64_t sample, int64_t texts) const {
        const int64_t longest = op_.images.longest, images = images_.count();
        float* out = op_.plans + sample * op_.texts.longest * longest;
        for (int64_t text = 0; text < texts; ++text, out += longest) {
            __builtin_memcpy(out, weighted_.get() + text * columns_, images * sizeof(float));
            __builtin_memset(out + images, 0, (longest - images) * sizeof(float));
        }
        __builtin_memset(out, 0, (op_.texts.longest - texts) * longest * sizeof(float));
    }

    const TransportForward& op_;
    UnitRows<T> texts_, images_;
    int64_t columns_ = 0;  // images in whole registers
    Scratch<float> cosines_, kernel_, weighted_, sums_, image_scale_;
};

template <typename T>
class Backward {
  public:
    explicit Backward(const TransportBackward& op)
        : op_(op),
          texts_(op.texts, op.width),
          images_(op.images, op.width),
          grad_texts_(op.texts.longest * texts_.stride()),
          grad_images_(op.images.longest * images_.stride()) {}

    void run(int64_t sample) {
        texts_.open(sample);
        images_.open(sample);
        if (texts_.count() == 0 || images_.count() == 0) {
            texts_.write_zeros(op_.grad_texts);
            images_.write_zeros(op_.grad_images);
            return;
        }
        const Rows plan{op_.plans + sample * op_.texts.longest * op_.images.longest, op_.images.longest};
        const int64_t width = round_up(op_.width, lanes);
        multiply(as_left(plan), images_.rows(), texts_.count(), images_.count(), width, grad_texts_.get(),
                 texts_.stride());
        multiply(transposed(plan), texts_.rows(), images_.count(), texts_.count(), width, grad_images_.get(),
                 images_.stride());
        const float factor = -op_.grad_distances[sample];  // the cost falls as the cosine rises
        texts_.differentiate(factor, grad_texts_.get(), op_.grad_texts);
        images_.differentiate(factor, grad_images_.get(), op_.grad_images);
    }

  private:
    const TransportBackward& op_;
    UnitRows<T> texts_, images_;
    Scratch<float> grad_texts_, grad_images_;
};

template <template <typename> class Direction, typename Op>
void run_samples(const Op& op, int64_t begin, int64_t end) {
    visit(op.dtype, [&](auto element) {
        Direction<decltype(element)> direction(op);
        for (int64_t sample = begin; sample < end; ++sample) direction.run(sample);
    });
}

}  // namespace

void optimal_transport_forward(const TransportForward& op, int64_t begin, int64_t end) {
    run_samples<Forward>(op, begin, end);
}

void optimal_transport_backward(const TransportBackward& op, int64_t begin, int64_t end) {
    run_samples<Backward>(op, begin, end);
}

}  // namespace vlk::VLK_ISA
