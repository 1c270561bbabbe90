package org.pytorch.executorch

/** Types of tensors' elements, those that are used here. */
enum class DType(@JvmField val jniCode: Int) {
    UINT8(0),
    INT8(1),
    INT32(3),
    INT64(4),
    HALF(5),
    FLOAT(6),
}
