package org.mobilemm.executorch

import org.mobilemm.ManifestReader
import org.mobilemm.MobileMMError
import org.mobilemm.Part
import org.mobilemm.Tensor
import org.mobilemm.TensorSpec
import org.mobilemm.oneLine
import org.mobilemm.shown
import org.pytorch.executorch.DType
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import java.io.File
import org.pytorch.executorch.Tensor as NativeTensor

/**
 * A method of a .pte file, loaded; its mutable buffers, keys and values among them, live as long as it does.
 *
 * Raises [MobileMMError] when ExecuTorch refuses it. The library tells no shapes: each call's tensors are compared with
 * those of the manifest, a dimension with a name going up to the context.
 */
internal class ExecuTorchProgram(
    private val file: File,
    private val method: String,
    private val part: Part,
    private val context: Int,
    threads: Int,
) : AutoCloseable {
    private val module: Module = guarded("cannot be loaded by ExecuTorch") { Module.load(file.path, Module.LOAD_MODE_MMAP, threads) }

    init {
        try {
            val known = guarded("cannot be loaded by ExecuTorch") { module.getMethods() }
            if (method !in known) throw refusal("is not in the program")
            guarded("cannot be loaded by ExecuTorch") { module.loadMethod(method) }
        } catch (error: MobileMMError) {
            module.close()
            throw error
        }
    }

    /** The method's output, in float32: in `into`, or in memory of its own. */
    fun run(
        inputs: List<Tensor>,
        into: Tensor? = null,
    ): Tensor {
        if (inputs.size != part.inputs.size) throw refusal("is given ${inputs.size} inputs, where the manifest has ${part.inputs.size}")
        for ((tensor, spec) in inputs.zip(part.inputs)) check("input", tensor.dtype, tensor.shape, spec)
        // The runtime reads the inputs' memory while the method runs.
        val given = inputs.map { EValue.from(native(it)) }.toTypedArray()
        val found = guarded("failed") { module.execute(method, *given) }
        val output = found.singleOrNull()?.takeIf { it.isTensor }?.toTensor() ?: throw refusal("gives no tensor")
        val dtype = TYPES[output.dtype()] ?: "${output.dtype()}"
        val shape = output.shape().toList()
        check("output", dtype, shape, part.outputs[0])
        if (dtype != "float32" && dtype != "float16") throw refusal("gives $dtype, which is unknown here")
        val target = into ?: Tensor.of("float32", *output.shape())
        if (target.shape != shape) throw refusal("gives $shape, where ${target.shape} is wanted")
        // A copy: what a method gives lies in memory that its next call writes over.
        output.copyDataInto(target.floats())
        return target
    }

    override fun close() = module.close()

    private fun check(
        side: String,
        dtype: String,
        shape: List<Long>,
        spec: TensorSpec,
    ) {
        val fits =
            dtype == spec.dtype && shape.size == spec.shape.size &&
                shape.zip(spec.shape).all { (size, wanted) -> if (wanted is Long) size == wanted else size in 1..context }
        if (!fits) throw refusal("has $dtype $shape as $side, where the manifest has ${shown(spec.name)}, ${spec.dtype} ${spec.shape}")
    }

    private fun native(tensor: Tensor): NativeTensor {
        val shape = tensor.shape.toLongArray()
        return when (tensor.dtype) {
            "float32" -> NativeTensor.fromBlob(tensor.floats(), shape)
            "float16" -> NativeTensor.fromBlob(tensor.view().asShortBuffer(), shape)
            "uint8" -> NativeTensor.fromBlobUnsigned(tensor.view(), shape)
            "int8" -> NativeTensor.fromBlob(tensor.view(), shape)
            "int32" -> NativeTensor.fromBlob(tensor.view().asIntBuffer(), shape)
            "int64" -> NativeTensor.fromBlob(tensor.view().asLongBuffer(), shape)
            else -> throw refusal("is given ${tensor.dtype}, which is unknown here")
        }
    }

    private fun refusal(wrong: String) = MobileMMError("$file: method '$method' $wrong; ${ManifestReader.AGAIN}")

    /** What ExecuTorch raises becomes one line, as does a library that this processor has none of. */
    private fun <T> guarded(
        failed: String,
        action: () -> T,
    ): T =
        try {
            action()
        } catch (error: RuntimeException) {
            throw MobileMMError("$file: method '$method' $failed (${oneLine(error)})", error)
        } catch (error: LinkageError) {
            throw MobileMMError("$file: this app has no ExecuTorch for this processor (${oneLine(error)})", error)
        }

    private companion object {
        val TYPES =
            mapOf(
                DType.FLOAT to "float32",
                DType.HALF to "float16",
                DType.UINT8 to "uint8",
                DType.INT8 to "int8",
                DType.INT32 to "int32",
                DType.INT64 to "int64",
            )
    }
}
