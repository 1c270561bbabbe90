package org.pytorch.executorch

import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer

/**
 * Numbers in direct memory, of the machine's byte order. A buffer must be as long as the shape says, from its beginning on
 * whatever has been read of it.
 */
abstract class Tensor internal constructor(shape: LongArray) {
    private val sizes = shape.copyOf()

    fun shape(): LongArray = sizes.copyOf()

    abstract fun dtype(): DType

    internal abstract val buffer: Buffer

    open fun copyDataInto(dst: FloatBuffer) {
        throw IllegalStateException("a tensor of ${dtype()} cannot be copied into a FloatBuffer")
    }

    companion object {
        @JvmStatic
        fun fromBlobUnsigned(data: ByteBuffer, shape: LongArray): Tensor = checked(data, data.order(), shape, DType.UINT8)

        @JvmStatic
        fun fromBlob(data: ByteBuffer, shape: LongArray): Tensor = checked(data, data.order(), shape, DType.INT8)

        @JvmStatic
        fun fromBlob(data: IntBuffer, shape: LongArray): Tensor = checked(data, data.order(), shape, DType.INT32)

        @JvmStatic
        fun fromBlob(data: FloatBuffer, shape: LongArray): Tensor = checked(data, data.order(), shape, DType.FLOAT)

        @JvmStatic
        fun fromBlob(data: ShortBuffer, shape: LongArray): Tensor = checked(data, data.order(), shape, DType.HALF)

        @JvmStatic
        fun fromBlob(data: LongBuffer, shape: LongArray): Tensor = checked(data, data.order(), shape, DType.INT64)

        private fun checked(
            data: Buffer,
            order: ByteOrder,
            shape: LongArray,
            dtype: DType,
        ): Tensor {
            require(shape.all { it >= 0 } && shape.fold(1L) { product, size -> product * size } == data.capacity().toLong()) {
                "a buffer of ${data.capacity()} for ${shape.toList()}"
            }
            require(data.isDirect && order == ByteOrder.nativeOrder()) { "a buffer that is not direct, or of another byte order" }
            return BufferTensor(data, shape, dtype)
        }
    }
}
