package org.pytorch.executorch

/** A method's input or output; here always a tensor. */
class EValue private constructor(private val tensor: Tensor) {
    val isTensor: Boolean get() = true

    fun toTensor(): Tensor = tensor

    companion object {
        @JvmStatic
        fun from(tensor: Tensor): EValue = EValue(tensor)
    }
}
