import SwiftUI
import UIKit

/// The system's camera; `taken` gets the photograph as JPEG.
struct CameraView: UIViewControllerRepresentable {
    let taken: @MainActor (Data) -> Void
    @Environment(\.dismiss) private var dismiss

    static var isAvailable: Bool { UIImagePickerController.isSourceTypeAvailable(.camera) }

    func makeUIViewController(context: Context) -> UIImagePickerController {
        let controller = UIImagePickerController()
        controller.sourceType = .camera
        controller.delegate = context.coordinator
        return controller
    }

    func updateUIViewController(_ controller: UIImagePickerController, context: Context) {}

    func makeCoordinator() -> Coordinator { Coordinator(self) }

    @MainActor
    final class Coordinator: NSObject, UIImagePickerControllerDelegate, UINavigationControllerDelegate {
        private let view: CameraView

        init(_ view: CameraView) {
            self.view = view
        }

        func imagePickerController(
            _ picker: UIImagePickerController, didFinishPickingMediaWithInfo info: [UIImagePickerController.InfoKey: Any]
        ) {
            if let data = (info[.originalImage] as? UIImage)?.jpegData(compressionQuality: 0.9) { view.taken(data) }
            view.dismiss()
        }

        func imagePickerControllerDidCancel(_ picker: UIImagePickerController) { view.dismiss() }
    }
}
