// The kernels of one instruction set, chosen when a session is made.

#ifndef SQC_ENGINE_KERNELS_H_
#define SQC_ENGINE_KERNELS_H_

#include "base/isa.h"
#include "kernels/activation/activation.h"
#include "kernels/attention/attention.h"
#include "kernels/fconv/fconv.h"
#include "kernels/fgemm/fgemm.h"
#include "kernels/kvcache/kvcache.h"
#include "kernels/norm/norm.h"
#include "kernels/q4gemm/q4gemm.h"
#include "kernels/q4sparse/q4sparse.h"
#include "kernels/qbinary/qbinary.h"
#include "kernels/qblock/qblock.h"
#include "kernels/qconv/qconv.h"
#include "kernels/qconvblock/qconvblock.h"
#include "kernels/qconvsparse/qconvsparse.h"
#include "kernels/qdepthwise/qdepthwise.h"
#include "kernels/qgemm/qgemm.h"
#include "kernels/qimage/qimage.h"
#include "kernels/qsparse/qsparse.h"
#include "kernels/quantize/quantize.h"
#include "kernels/rope/rope.h"
#include "kernels/softmax/softmax.h"

namespace sqc {

struct Kernels {
  explicit Kernels(Isa isa) noexcept
      : isa(isa),
        activation(activation_kernel(isa)),
        attention(attention_kernel(isa)),
        fconv(fconv_kernel(isa)),
        fgemm(fgemm_kernel(isa)),
        kvcache(kvcache_kernel(isa)),
        norm(norm_kernel(isa)),
        quantize(quantize_kernel(isa)),
        qgemm(qgemm_kernel(isa)),
        q4gemm(q4gemm_kernel(isa)),
        qsparse(qsparse_kernel(isa)),
        q4sparse(q4sparse_kernel(isa)),
        qbinary(qbinary_kernel(isa)),
        qblock(qblock_kernel(isa)),
        qconv(qconv_kernel(isa)),
        qconvblock(qconvblock_kernel(isa)),
        qconvsparse(qconvsparse_kernel(isa)),
        qdepthwise(qdepthwise_kernel(isa)),
        qimage(qimage_kernel(isa)),
        rope(rope_kernel(isa)),
        softmax(softmax_kernel(isa)) {}

  Isa isa;
  Kernel<ActivationFunction> activation;
  Kernel<AttentionFunction> attention;
  Kernel<FconvFunction> fconv;
  Kernel<FgemmFunction> fgemm;
  Kernel<KvcacheFunction> kvcache;
  Kernel<NormFunction> norm;
  Kernel<QuantizeFunction> quantize;
  Kernel<QgemmFunction> qgemm;
  Kernel<Q4gemmFunction> q4gemm;
  Kernel<QsparseFunction> qsparse;
  Kernel<Q4sparseFunction> q4sparse;
  Kernel<QbinaryFunction> qbinary;
  Kernel<QblockFunction> qblock;
  Kernel<QconvFunction> qconv;
  Kernel<QconvblockFunction> qconvblock;
  Kernel<QconvsparseFunction> qconvsparse;
  Kernel<QdepthwiseFunction> qdepthwise;
  Kernel<QimageFunction> qimage;
  Kernel<RopeFunction> rope;
  Kernel<SoftmaxFunction> softmax;
};

}  // namespace sqc

#endif  // SQC_ENGINE_KERNELS_H_
